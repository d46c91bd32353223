"""Triton bodies of indexer_key_cache: one program for a tile of keys, written or read."""

from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TOKENS, CompileCase, Traffic, once
from v4quant.kernels._decoding_triton import e2m1_value
from v4quant.kernels._kv_cache_triton import constants, rms_norm_tile, rotate_tile
from v4quant.kernels._rounding_triton import bf16_bits, e2m1_code, e8m0_byte, from_bf16_bits, power_of_two
from v4quant.kernels.kv_layout import PageLayout, key_layout

WRITE_ROWS = 4
READ_ROWS = 32


@triton.jit
def _indexer_key_write_fp4_kernel(
    x_ptr,
    weight_ptr,
    cos_sin_ptr,
    page_ptr,
    slot_ptr,
    T,
    eps,
    ENTRIES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    SCALES: tl.constexpr,
    BF16_WEIGHT: tl.constexpr,
    D: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slot_ptr + row, mask=row < T, other=-1)
    found = (slot >= 0)[:, None]
    column = tl.arange(0, D)[None, :]
    x = from_bf16_bits(tl.load(x_ptr + row[:, None] * D + column, mask=found, other=0))  # [ROWS, I]
    mean_square = tl.sum(x * x, axis=1, keep_dims=True) / D
    y = rms_norm_tile(x, weight_ptr, column, mean_square, eps, BF16_WEIGHT)
    pair = tl.arange(0, D // 2)[None, :] - (D - 64) // 2
    angle = row[:, None] * 64 + pair
    rotating = found & (pair >= 0)
    cos = tl.load(cos_sin_ptr + angle, mask=rotating, other=0.0)  # [ROWS, I/2]
    sin = tl.load(cos_sin_ptr + angle + 32, mask=rotating, other=0.0)
    y = tl.where(column < D - 64, y, rotate_tile(y, cos, sin))
    for stage in tl.static_range(STAGES):
        groups = tl.reshape(y, [ROWS, D >> (stage + 1), 2, 1 << stage])
        low, high = tl.split(tl.permute(groups, [0, 1, 3, 2]))  # [ROWS, I/2s, s]
        y = tl.reshape(tl.permute(tl.join(low + high, low - high), [0, 1, 3, 2]), [ROWS, D])
    blocks = tl.reshape(from_bf16_bits(bf16_bits(y * NORM)), [ROWS, SCALES, 32])
    scale_byte = e8m0_byte(tl.maximum(tl.max(tl.abs(blocks), axis=2), 6 * 2.0**-126), 1 / 6)  # [ROWS, I/32]
    code = e2m1_code(blocks / power_of_two(scale_byte)[:, :, None])
    low_code, high_code = tl.split(tl.reshape(code, [ROWS, D // 2, 2]))
    page = (slot // ENTRIES).to(tl.int64) * PAGE_BYTES
    entry = slot % ENTRIES
    data = (page + entry * (D // 2))[:, None] + tl.arange(0, D // 2)
    tl.store(page_ptr + data, low_code | (high_code << 4), mask=found)
    scale = (page + ENTRIES * (D // 2) + entry * SCALES)[:, None] + tl.arange(0, SCALES)
    tl.store(page_ptr + scale, scale_byte.to(tl.uint8), mask=found)


@triton.jit
def _indexer_key_read_fp4_kernel(
    page_ptr,
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
    found = (slot >= 0)[:, None]
    page = (slot // ENTRIES).to(tl.int64) * PAGE_BYTES
    entry = slot % ENTRIES
    data = (page + entry * (D // 2))[:, None] + tl.arange(0, D // 2)  # [ROWS, I/2]
    packed = tl.load(page_ptr + data, mask=found, other=0)
    scale = (page + ENTRIES * (D // 2) + entry * SCALES)[:, None] + tl.arange(0, SCALES)  # [ROWS, I/32]
    scale_byte = tl.load(page_ptr + scale, mask=found, other=127)
    value = tl.interleave(e2m1_value(packed & 15), e2m1_value(packed >> 4))  # [ROWS, I]
    value = tl.reshape(value, [ROWS, SCALES, 32]) * power_of_two(scale_byte)[:, :, None]
    bits = tl.reshape(bf16_bits(value), [ROWS, D])
    tl.store(out_ptr + row[:, None] * D + tl.arange(0, D), bits, mask=(row < T)[:, None])


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
        kernel: Any = _indexer_key_write_fp4_kernel[(triton.cdiv(tokens, WRITE_ROWS),)]
        kernel(
            x.view(torch.uint16),
            weight.view(torch.uint16) if is_bf16 else weight,
            cos_sin,
            pages,
            slots,
            tokens,
            eps,
            **_write_constants(layout, dim, is_bf16),
            num_warps=1,
            enable_fp_fusion=False,
        )


def launch_read(pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout, dim: int) -> torch.Tensor:
    """Run the kernel; arguments are checked."""
    out = torch.empty(len(slots), dim, dtype=torch.bfloat16, device=pages.device)
    if len(slots):
        kernel: Any = _indexer_key_read_fp4_kernel[(triton.cdiv(len(slots), READ_ROWS),)]
        tile = {**constants(layout), "D": dim, "ROWS": READ_ROWS}
        kernel(pages, slots, out.view(torch.uint16), len(slots), **tile, enable_fp_fusion=False)
    return out


def _write_constants(layout: PageLayout, dim: int, is_bf16: bool) -> dict[str, Any]:
    return {
        **constants(layout),
        "BF16_WEIGHT": is_bf16,
        "D": dim,
        "STAGES": dim.bit_length() - 1,
        "NORM": dim**-0.5,
        "ROWS": WRITE_ROWS,
    }


_WRITE = {
    "x_ptr": "*u16",
    "weight_ptr": "*fp32",
    "cos_sin_ptr": "*fp32",
    "page_ptr": "*u8",
    "slot_ptr": "*i32",
    "T": "i32",
    "eps": "fp32",
    **dict.fromkeys(["ENTRIES", "PAGE_BYTES", "SCALES", "BF16_WEIGHT", "D", "STAGES", "NORM", "ROWS"], "constexpr"),
}
_READ = {
    "page_ptr": "*u8",
    "slot_ptr": "*i32",
    "out_ptr": "*u16",
    "T": "i32",
    **dict.fromkeys(["ENTRIES", "PAGE_BYTES", "SCALES", "D", "ROWS"], "constexpr"),
}
# Compressed entries of a prefill chunk.
_COUNT = TOKENS // 4
_WRITTEN = _COUNT * (128 * 2 + 64 * 4 + 4 + key_layout(64).data_bytes + key_layout(64).scale_bytes)
COMPILE_CASES = [
    CompileCase(
        "indexer_key_write_fp4",
        _indexer_key_write_fp4_kernel,
        _WRITE,
        _write_constants(key_layout(64), 128, is_bf16=False),
        Traffic(_WRITTEN + _COUNT // WRITE_ROWS * 128 * 4, _WRITTEN + 128 * 4),
        frozenset({"T", "eps"}),
        num_warps=1,
    ),
    CompileCase(
        "indexer_key_read_fp4",
        _indexer_key_read_fp4_kernel,
        _READ,
        {**constants(key_layout(64)), "D": 128, "ROWS": READ_ROWS},
        once(_COUNT * (4 + key_layout(64).data_bytes + key_layout(64).scale_bytes + 128 * 2)),
        frozenset({"T"}),
    ),
]
