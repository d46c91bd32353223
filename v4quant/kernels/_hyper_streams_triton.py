"""Triton bodies that move the streams of hyper-connections: their sum into one, and their combination with a result.

One program for a token and a block of dims, which it holds of all streams.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TOKENS, CompileCase, Traffic
from v4quant.kernels._rounding_triton import bf16_bits, from_bf16_bits

MAX_DIMS = 1024  # of a program


@triton.jit
def _collapse_kernel(x_ptr, pre_ptr, out_ptr, D, S: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = dim < D
    y = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(S):
        x = from_bf16_bits(tl.load(x_ptr + (token * S + j) * D + dim, mask=mask, other=0))
        y += tl.load(pre_ptr + token * S + j) * x
    tl.store(out_ptr + token * D + dim, bf16_bits(y), mask=mask)


@triton.jit
def _combine_kernel(f_ptr, x_ptr, post_ptr, comb_ptr, out_ptr, D, S: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = dim < D
    k = tl.arange(0, S)  # [S], streams written
    f = from_bf16_bits(tl.load(f_ptr + token * D + dim, mask=mask, other=0))
    y = tl.load(post_ptr + token * S + k)[:, None] * f[None, :]  # [S, BLOCK]
    for j in tl.static_range(S):
        x = from_bf16_bits(tl.load(x_ptr + (token * S + j) * D + dim, mask=mask, other=0))
        y += tl.load(comb_ptr + (token * S + j) * S + k)[:, None] * x[None, :]
    tl.store(out_ptr + (token * S + k[:, None]) * D + dim, bf16_bits(y), mask=mask[None, :])


def dims_per_program(dims: int) -> int:
    """Dims of one token that a program moves."""
    return min(MAX_DIMS, int(triton.next_power_of_2(dims)))


def launch_combine(f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """Run hyper_combine; arguments are checked."""
    tokens, streams, dims = x.shape
    out = torch.empty_like(x)
    if tokens:
        block = dims_per_program(dims)
        kernel: Any = _combine_kernel[(tokens, triton.cdiv(dims, block))]
        views = (f.view(torch.uint16), x.view(torch.uint16), post, comb, out.view(torch.uint16))
        kernel(*views, dims, S=streams, BLOCK=block, enable_fp_fusion=False)
    return out


def weighted_sum(x: torch.Tensor, pre: torch.Tensor) -> torch.Tensor:
    """Streams bfloat16 [T, S, D] summed with weights float32 [T, S]: bfloat16 [T, D]."""
    tokens, streams, dims = x.shape
    out = torch.empty(tokens, dims, dtype=torch.bfloat16, device=x.device)
    if tokens:
        block = dims_per_program(dims)
        kernel: Any = _collapse_kernel[(tokens, triton.cdiv(dims, block))]
        kernel(x.view(torch.uint16), pre, out.view(torch.uint16), dims, S=streams, BLOCK=block, enable_fp_fusion=False)
    return out


_COLLAPSE = {"x_ptr": "*u16", "pre_ptr": "*fp32", "out_ptr": "*u16", "D": "i32", "S": "constexpr", "BLOCK": "constexpr"}
_COMBINE = {
    "f_ptr": "*u16",
    "x_ptr": "*u16",
    "post_ptr": "*fp32",
    "comb_ptr": "*fp32",
    "out_ptr": "*u16",
    "D": "i32",
    "S": "constexpr",
    "BLOCK": "constexpr",
}


def _traffic(streams: int, weights: int) -> Traffic:
    """Of Flash's 4096 dims: `streams` read or written, and weights read by every block of a token."""
    rows = TOKENS * streams * 4096 * 2
    return Traffic(rows + TOKENS * 4096 // MAX_DIMS * weights * 4, rows + TOKENS * weights * 4)


_CONSTANTS = {"S": 4, "BLOCK": MAX_DIMS}
COMPILE_CASES = [
    CompileCase("hyper_mix collapse", _collapse_kernel, _COLLAPSE, _CONSTANTS, _traffic(4 + 1, 4)),
    CompileCase("hyper_combine", _combine_kernel, _COMBINE, _CONSTANTS, _traffic(1 + 4 + 4, 4 + 16)),
]
