"""Triton bodies of kv_cache: one program for a token that is written, one for a tile of slots that are read."""

from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TOKENS, CompileCase, Traffic, once
from v4quant.kernels._decoding_triton import e4m3_or_nan
from v4quant.kernels._rounding_triton import bf16_bits, e4m3_byte, e8m0_byte, from_bf16_bits, power_of_two
from v4quant.kernels.kv_layout import PageLayout, kv_layout

READ_ROWS = 8


@triton.jit
def rms_norm_tile(x, weight_ptr, column, mean_square, eps, BF16_WEIGHT: tl.constexpr):
    """Elements of rows after RMSNorm, float32 that BF16 holds."""
    weight = tl.load(weight_ptr + column)
    if BF16_WEIGHT:
        weight = from_bf16_bits(weight)
    return from_bf16_bits(bf16_bits(x * tl.rsqrt(mean_square + eps) * weight))


@triton.jit
def rotate_tile(y, cos, sin):
    """Rotate adjacent pairs of the last axis [.., C] by angles [.., C/2]: float32 that BF16 holds."""
    even, odd = tl.split(tl.reshape(y, [y.shape[0], y.shape[1] // 2, 2]))
    rotated = tl.interleave(even * cos - odd * sin, even * sin + odd * cos)
    return from_bf16_bits(bf16_bits(rotated))


@triton.jit
def _kv_write_fp8_kernel(
    x_ptr,
    weight_ptr,
    cos_sin_ptr,
    byte_ptr,
    wide_ptr,
    slot_ptr,
    eps,
    ENTRIES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    SCALES: tl.constexpr,
    BF16_WEIGHT: tl.constexpr,
    D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot >= 0:
        groups: tl.constexpr = D // 64
        data_bytes: tl.constexpr = D + 64
        page = (slot // ENTRIES).to(tl.int64) * PAGE_BYTES
        data = page + slot % ENTRIES * data_bytes
        group = tl.arange(0, groups)[:, None]
        column = group * 64 + tl.arange(0, 64)  # [G, 64]
        # The last group is the RoPE part, which stays BF16.
        coded = group < groups - 1
        x = from_bf16_bits(tl.load(x_ptr + token * D + column))
        y = rms_norm_tile(x, weight_ptr, column, tl.sum(x * x) / D, eps, BF16_WEIGHT)
        pair = cos_sin_ptr + token * 64 + tl.arange(0, 32)[None, :]
        rope = bf16_bits(rotate_tile(y, tl.load(pair), tl.load(pair + 32)))
        tl.store(wide_ptr + data // 2 - (D - 64) // 2 + column, rope, mask=column >= D - 64)
        scale_byte = e8m0_byte(tl.maximum(tl.max(tl.abs(y), axis=1, keep_dims=True), 1e-4), 1 / 448)  # [G, 1]
        code = e4m3_byte(y / power_of_two(scale_byte))
        tl.store(byte_ptr + data + column, code, mask=coded & (column >= 0))
        # Zeros behind the scales, up to SCALES bytes.
        scale = tl.arange(0, SCALES)
        padded = tl.sum(tl.where((group == scale) & coded, scale_byte, 0), axis=0)
        tl.store(byte_ptr + page + ENTRIES * data_bytes + slot % ENTRIES * SCALES + scale, padded.to(tl.uint8))


@triton.jit
def _kv_read_fp8_kernel(
    byte_ptr,
    wide_ptr,
    slot_ptr,
    out_ptr,
    T,
    ENTRIES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    SCALES: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slot_ptr + row, mask=row < T, other=-1)
    bits = gather_fp8(byte_ptr, wide_ptr, slot, ENTRIES, PAGE_BYTES, SCALES, D)
    tl.store(out_ptr + row[:, None] * D + tl.arange(0, D), bits, mask=(row < T)[:, None])


@triton.jit
def gather_fp8(
    byte_ptr,
    wide_ptr,
    slot,
    ENTRIES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    SCALES: tl.constexpr,
    D: tl.constexpr,
):
    """BF16 bits of the entries in some slots [N], zeros for slot -1: [N, D]. byte_ptr and wide_ptr are one address."""
    groups: tl.constexpr = D // 64
    data_bytes: tl.constexpr = D + 64
    group = tl.arange(0, groups)
    page = (slot // ENTRIES).to(tl.int64)
    entry = slot % ENTRIES
    found = slot >= 0
    coded = found[:, None] & (group < groups - 1)  # [N, G]
    scale = (page * PAGE_BYTES + ENTRIES * data_bytes + entry * SCALES)[:, None] + group
    scale_byte = tl.load(byte_ptr + scale, mask=coded, other=127)
    column = group[:, None] * 64 + tl.arange(0, 64)  # [G, 64]
    byte = (page * PAGE_BYTES + entry * data_bytes)[:, None, None] + column  # [N, G, 64]
    code = tl.load(byte_ptr + byte, mask=coded[:, :, None], other=0)
    rope = found[:, None, None] & (group == groups - 1)[:, None]
    wide = (page * (PAGE_BYTES // 2) + entry * (data_bytes // 2))[:, None, None] + column - (D - 64) // 2
    rope_bits = tl.load(wide_ptr + wide, mask=rope, other=0)
    value = e4m3_or_nan(code) * power_of_two(scale_byte)[:, :, None]  # exact in BF16
    coded_bits = (value.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
    return tl.reshape(tl.where(rope, rope_bits, coded_bits), [slot.shape[0], D])


def launch_write(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: PageLayout,
) -> None:
    """Run the kernel; arguments are checked."""
    tokens, dim = x.shape
    if tokens:
        is_bf16 = weight.dtype == torch.bfloat16
        kernel: Any = _kv_write_fp8_kernel[(tokens,)]
        kernel(
            x.view(torch.uint16),
            weight.view(torch.uint16) if is_bf16 else weight,
            cos_sin,
            pages,
            pages.view(torch.uint16),
            slots,
            eps,
            **constants(layout),
            BF16_WEIGHT=is_bf16,
            D=dim,
            num_warps=1,
            enable_fp_fusion=False,
        )


def launch_read(pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout, dim: int) -> torch.Tensor:
    """Run the kernel; arguments are checked."""
    out = torch.empty(len(slots), dim, dtype=torch.bfloat16, device=pages.device)
    if len(slots):
        kernel: Any = _kv_read_fp8_kernel[(triton.cdiv(len(slots), READ_ROWS),)]
        kernel(
            pages,
            pages.view(torch.uint16),
            slots,
            out.view(torch.uint16),
            len(slots),
            **constants(layout),
            D=dim,
            ROWS=READ_ROWS,
            enable_fp_fusion=False,
        )
    return out


def constants(layout: PageLayout) -> dict[str, int]:
    """What kernels are compiled with for a page."""
    return {"ENTRIES": layout.entries, "PAGE_BYTES": layout.page_bytes, "SCALES": layout.scale_bytes}


_WRITE = {
    "x_ptr": "*u16",
    "weight_ptr": "*fp32",
    "cos_sin_ptr": "*fp32",
    "byte_ptr": "*u8",
    "wide_ptr": "*u16",
    "slot_ptr": "*i32",
    "eps": "fp32",
    **dict.fromkeys(["ENTRIES", "PAGE_BYTES", "SCALES", "BF16_WEIGHT", "D"], "constexpr"),
}
_READ = {
    "byte_ptr": "*u8",
    "wide_ptr": "*u16",
    "slot_ptr": "*i32",
    "out_ptr": "*u16",
    "T": "i32",
    **dict.fromkeys(["ENTRIES", "PAGE_BYTES", "SCALES", "D", "ROWS"], "constexpr"),
}
_WRITTEN = TOKENS * (512 * 2 + 64 * 4 + 4 + kv_layout(256).data_bytes + kv_layout(256).scale_bytes)
# Pages of 256 tokens: of the window and of HCA, whose padding is another; CSA has the window's alignment.
COMPILE_CASES = [
    *(
        CompileCase(
            f"kv_write_fp8 {entries}",
            _kv_write_fp8_kernel,
            _WRITE,
            {**constants(kv_layout(entries)), "BF16_WEIGHT": False, "D": 512},
            Traffic(_WRITTEN + TOKENS * 512 * 4, _WRITTEN + 512 * 4),  # each token reads the weight
            frozenset({"eps"}),
            num_warps=1,
        )
        for entries in (256, 2)
    ),
    CompileCase(
        "kv_read_fp8 256",
        _kv_read_fp8_kernel,
        _READ,
        {**constants(kv_layout(256)), "D": 512, "ROWS": READ_ROWS},
        once(TOKENS * (4 + kv_layout(256).data_bytes + 7 + 512 * 2)),  # the eighth scale byte is padding
        frozenset({"T"}),
    ),
]
