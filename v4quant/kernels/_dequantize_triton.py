"""Triton bodies of dequantize: FP4 in runs of blocks, which lie one after another; FP8 a tile in one block each."""

from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import CompileCase, Traffic, once
from v4quant.kernels._decoding_triton import e2m1_value, e4m3_or_nan, e8m0_value
from v4quant.kernels._rounding_triton import bf16_bits

FP4_BLOCKS = 128
FP8_ROWS = 32  # a divisor of 128


@triton.jit
def _scale(scale_ptr, offset, mask, IS_E8M0: tl.constexpr):
    scale = tl.load(scale_ptr + offset, mask=mask, other=0)
    if IS_E8M0:
        scale = e8m0_value(scale)
    return scale


@triton.jit
def _bf16_or_nan(value):
    """BF16 bits; rounding by integers would turn some NaN into other numbers."""
    return tl.where(value != value, 0x7FC0, bf16_bits(value)).to(tl.uint16)


@triton.jit
def _dequantize_fp4_kernel(packed_ptr, scale_ptr, out_ptr, COUNT, IS_E8M0: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    mask = block < COUNT
    packed = tl.load(packed_ptr + block[:, None] * 16 + tl.arange(0, 16), mask=mask[:, None], other=0)
    codes = tl.interleave(packed & 15, packed >> 4)  # [BLOCKS, 32]
    value = e2m1_value(codes) * _scale(scale_ptr, block, mask, IS_E8M0)[:, None]
    tl.store(out_ptr + block[:, None] * 32 + tl.arange(0, 32), _bf16_or_nan(value), mask=mask[:, None])


@triton.jit
def _dequantize_fp8_kernel(code_ptr, scale_ptr, out_ptr, N, K, IS_E8M0: tl.constexpr, ROWS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    block = tl.program_id(1).to(tl.int64)
    row = first + tl.arange(0, ROWS)  # [ROWS]
    column = block * 128 + tl.arange(0, 128)  # [128]
    mask = (row < N)[:, None] & (column < K)[None, :]
    offset = row[:, None] * K + column
    value = e4m3_or_nan(tl.load(code_ptr + offset, mask=mask, other=0))  # [ROWS, 128]
    value *= _scale(scale_ptr, first // 128 * tl.cdiv(K, 128) + block, True, IS_E8M0)
    tl.store(out_ptr + offset, _bf16_or_nan(value), mask=mask)


def launch_fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Run dequantize_fp4; arguments are checked."""
    out = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.bfloat16, device=packed.device)
    if count := scale.numel():
        kernel: Any = _dequantize_fp4_kernel[(triton.cdiv(count, FP4_BLOCKS),)]
        kernel(packed, scale, out.view(torch.uint16), count, IS_E8M0=scale.dtype == torch.uint8, BLOCKS=FP4_BLOCKS)
    return out


def launch_fp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Run dequantize_fp8; arguments are checked."""
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=codes.device)
    if out.numel():
        kernel: Any = _dequantize_fp8_kernel[(triton.cdiv(rows, FP8_ROWS), scale.shape[1])]
        kernel(
            codes.view(torch.uint8),
            scale,
            out.view(torch.uint16),
            rows,
            columns,
            IS_E8M0=scale.dtype == torch.uint8,
            ROWS=FP8_ROWS,
        )
    return out


def _cases(is_e8m0: bool) -> list[CompileCase]:
    name = "e8m0" if is_e8m0 else "f32"
    scale = {"scale_ptr": "*u8" if is_e8m0 else "*fp32", "out_ptr": "*u16"}
    fp4 = {"packed_ptr": "*u8", **scale, "COUNT": "i32", "IS_E8M0": "constexpr", "BLOCKS": "constexpr"}
    fp8 = {"code_ptr": "*u8", **scale, "N": "i32", "K": "i32", "IS_E8M0": "constexpr", "ROWS": "constexpr"}
    # An expert of Flash, and wo_b of Pro; each program reads the scale of its tile, the only one.
    scale_bytes = 1 if is_e8m0 else 4
    blocks, elements = 2048 * 4096 // 32, 7168 * 16384
    scales = elements // (128 * 128) * scale_bytes
    moved = Traffic(3 * elements + 128 // FP8_ROWS * scales, 3 * elements + scales)
    return [
        CompileCase(
            f"dequantize_fp4 {name}",
            _dequantize_fp4_kernel,
            fp4,
            {"IS_E8M0": is_e8m0, "BLOCKS": FP4_BLOCKS},
            once(blocks * (16 + scale_bytes + 64)),
        ),
        CompileCase(
            f"dequantize_fp8 {name}",
            _dequantize_fp8_kernel,
            fp8,
            {"IS_E8M0": is_e8m0, "ROWS": FP8_ROWS},
            moved,
        ),
    ]


COMPILE_CASES = [*_cases(True), *_cases(False)]
