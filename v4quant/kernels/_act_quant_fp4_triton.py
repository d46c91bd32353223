"""Triton bodies of act_quant_fp4: one program for a run of blocks, which lie one after another whatever the rows."""

from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TOKENS, CompileCase, once
from v4quant.kernels._decoding_triton import e2m1_value
from v4quant.kernels._rounding_triton import bf16_bits, e2m1_code, e8m0_byte, from_bf16_bits, power_of_two

BLOCKS = 128


@triton.jit
def _codes(x_ptr, block, mask):
    """Codes [BLOCKS, 32] and scale bytes [BLOCKS]."""
    offset = block[:, None] * 32 + tl.arange(0, 32)  # [BLOCKS, 32]
    x = from_bf16_bits(tl.load(x_ptr + offset, mask=mask[:, None], other=0))
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), 6 * 2.0**-126)  # [BLOCKS]
    byte = e8m0_byte(amax, 1 / 6)
    # Bytes run from 1 to 253, so the reciprocal is a normal number and the product exact, which "/" need not be.
    return e2m1_code(x * power_of_two(254 - byte)[:, None]), byte


@triton.jit
def _act_quant_fp4_kernel(x_ptr, packed_ptr, scale_ptr, COUNT, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    mask = block < COUNT
    codes, byte = _codes(x_ptr, block, mask)
    low, high = tl.split(tl.reshape(codes, [BLOCKS, 16, 2]))  # [BLOCKS, 16]
    offset = block[:, None] * 16 + tl.arange(0, 16)
    tl.store(packed_ptr + offset, low | (high << 4), mask=mask[:, None])
    tl.store(scale_ptr + block, byte.to(tl.uint8), mask=mask)


@triton.jit
def _act_round_fp4_kernel(x_ptr, out_ptr, COUNT, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    mask = block < COUNT
    codes, byte = _codes(x_ptr, block, mask)
    value = e2m1_value(codes) * power_of_two(byte)[:, None]  # [BLOCKS, 32]
    tl.store(out_ptr + block[:, None] * 32 + tl.arange(0, 32), bf16_bits(value), mask=mask[:, None])


def grid(count: int) -> tuple[int]:
    """Programs for so many blocks of 32."""
    return (triton.cdiv(count, BLOCKS),)


def launch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run act_quant_fp4; arguments are checked."""
    rows, columns = x.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=x.device)
    scale_e8m0 = torch.empty(rows, columns // 32, dtype=torch.uint8, device=x.device)
    if count := scale_e8m0.numel():
        kernel: Any = _act_quant_fp4_kernel[grid(count)]
        kernel(x.view(torch.uint16), packed, scale_e8m0, count, BLOCKS=BLOCKS, enable_fp_fusion=False)
    return packed, scale_e8m0


def launch_round(x: torch.Tensor) -> torch.Tensor:
    """Run act_round_fp4; arguments are checked."""
    out = torch.empty_like(x)
    if count := x.numel() // 32:
        kernel: Any = _act_round_fp4_kernel[grid(count)]
        kernel(x.view(torch.uint16), out.view(torch.uint16), count, BLOCKS=BLOCKS, enable_fp_fusion=False)
    return out


_SIZES = {"COUNT": "i32", "BLOCKS": "constexpr"}
_ODD = frozenset({"COUNT"})
_COUNT = TOKENS * 64 * 128 // 32  # blocks of the indexer's queries, 64 heads of 128
COMPILE_CASES = [
    CompileCase(
        "act_quant_fp4",
        _act_quant_fp4_kernel,
        {"x_ptr": "*u16", "packed_ptr": "*u8", "scale_ptr": "*u8", **_SIZES},
        {"BLOCKS": BLOCKS},
        once(_COUNT * (64 + 16 + 1)),
        _ODD,
    ),
    CompileCase(
        "act_round_fp4",
        _act_round_fp4_kernel,
        {"x_ptr": "*u16", "out_ptr": "*u16", **_SIZES},
        {"BLOCKS": BLOCKS},
        once(_COUNT * (64 + 64)),
        _ODD,
    ),
]
