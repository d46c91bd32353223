"""Triton body of rms_norm: one program for a row, which it holds whole."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TOKENS, CompileCase, Traffic
from v4quant.kernels._rounding_triton import bf16_bits, from_bf16_bits


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, D, eps, WEIGHT_IS_BF16: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    mask = column < D
    x = from_bf16_bits(tl.load(x_ptr + row * D + column, mask=mask, other=0))
    weight = tl.load(weight_ptr + column, mask=mask, other=0)
    if WEIGHT_IS_BF16:
        weight = from_bf16_bits(weight)
    y = x * tl.rsqrt(tl.sum(x * x) / D + eps) * weight
    tl.store(out_ptr + row * D + column, bf16_bits(y), mask=mask)


@dataclass(frozen=True)
class RmsNormLaunch:
    """How a row is held: `block` elements, masked beyond the row, by so many warps."""

    block: int
    num_warps: int


def plan(columns: int) -> RmsNormLaunch:
    """8 elements of BF16 a thread make a load of 128 bits; wide rows take more of them before they take more warps."""
    block = max(256, triton.next_power_of_2(columns))
    return RmsNormLaunch(block, num_warps=min(block // 256, 8 if block <= 8192 else 16))


def launch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Run the kernel; arguments are checked."""
    rows, columns = x.shape
    out = torch.empty_like(x)
    is_bf16 = weight.dtype == torch.bfloat16
    if rows:
        how = plan(columns)
        kernel: Any = _rms_norm_kernel[(rows,)]
        kernel(
            x.view(torch.uint16),
            weight.view(torch.uint16) if is_bf16 else weight,
            out.view(torch.uint16),
            columns,
            eps,
            WEIGHT_IS_BF16=is_bf16,
            BLOCK=how.block,
            num_warps=how.num_warps,
            enable_fp_fusion=False,
        )
    return out


def _case(columns: int, is_bf16: bool) -> CompileCase:
    how = plan(columns)
    signature = {
        "x_ptr": "*u16",
        "weight_ptr": "*u16" if is_bf16 else "*fp32",
        "out_ptr": "*u16",
        "D": "i32",
        "eps": "fp32",
        "WEIGHT_IS_BF16": "constexpr",
        "BLOCK": "constexpr",
    }
    name = f"rms_norm {columns} {'bf16' if is_bf16 else 'f32'} weight"
    constants = {"WEIGHT_IS_BF16": is_bf16, "BLOCK": how.block}
    weight = columns * (2 if is_bf16 else 4)
    rows = TOKENS * columns * (2 + 2)
    traffic = Traffic(rows + TOKENS * weight, rows + weight)  # each row reads the weight
    return CompileCase(name, _rms_norm_kernel, signature, constants, traffic, frozenset({"eps"}), how.num_warps)


# The indexer's compressor, Flash's query rank, Pro's hidden size; other widths are held alike.
COMPILE_CASES = [*(_case(columns, True) for columns in (128, 1024, 7168)), _case(7168, False)]
