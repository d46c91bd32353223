"""Triton body of query_norm_: one program for a tile of heads, whichever tokens they belong to."""

from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TOKENS, CompileCase, once
from v4quant.kernels._rounding_triton import bf16_bits, from_bf16_bits

TILE = 4096  # elements of a program, 32 a thread


@triton.jit
def _rounded(x):
    """float32 x rounded to BF16."""
    return from_bf16_bits(bf16_bits(x))


@triton.jit
def _query_norm_kernel(q_ptr, COUNT, D, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS], of T x H
    dim = tl.arange(0, BLOCK)
    offset = row[:, None] * D + dim  # [ROWS, BLOCK]
    mask = (row < COUNT)[:, None] & (dim < D)
    q = from_bf16_bits(tl.load(q_ptr + offset, mask=mask, other=0))
    total = tl.sum(_rounded(q * q), axis=1)  # [ROWS]
    mean = _rounded(tl.math.div_rn(total, tl.zeros_like(total) + D))
    # Approximate where a device has it so: no root of a BF16 number lies near enough to a tie for that to show.
    root = _rounded(tl.rsqrt(_rounded(mean + eps)))
    tl.store(q_ptr + offset, bf16_bits(q * root[:, None]), mask=mask)


def constants(dims: int) -> dict[str, int]:
    """Compile-time arguments for heads of so many dims."""
    block = triton.next_power_of_2(dims)
    return {"ROWS": max(1, TILE // block), "BLOCK": block}


def launch_(q: torch.Tensor, eps: float) -> torch.Tensor:
    """Run the kernel; arguments are checked, and eps is a BF16 number."""
    tokens, heads, dims = q.shape
    if count := tokens * heads:
        sizes = constants(dims)
        kernel: Any = _query_norm_kernel[(triton.cdiv(count, sizes["ROWS"]),)]
        kernel(q.view(torch.uint16), count, dims, eps, **sizes, enable_fp_fusion=False)
    return q


# Heads of Flash and Pro have 512 dims; Flash has 64 of them.
COMPILE_CASES = [
    CompileCase(
        "query_norm 512",
        _query_norm_kernel,
        {"q_ptr": "*u16", "COUNT": "i32", "D": "i32", "eps": "fp32", "ROWS": "constexpr", "BLOCK": "constexpr"},
        constants(512),
        once(TOKENS * 64 * 512 * (2 + 2)),
        frozenset({"COUNT", "eps"}),
    )
]
