"""Triton body of rope_: one program for a tile of heads, whichever tokens they belong to."""

from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TOKENS, CompileCase, Traffic
from v4quant.kernels._rounding_triton import bf16_bits, from_bf16_bits

TILE = 2048  # rotated elements of a program


@triton.jit
def _rope_kernel(x_ptr, cos_sin_ptr, COUNT, H, D, ROWS: tl.constexpr, R: tl.constexpr, INVERSE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS], of T x H
    mask = (row < COUNT)[:, None]
    offset = row[:, None] * D + (D - R) + tl.arange(0, R)  # [ROWS, R]
    x = from_bf16_bits(tl.load(x_ptr + offset, mask=mask, other=0))
    even, odd = tl.split(tl.reshape(x, [ROWS, R // 2, 2]))  # [ROWS, R/2]
    angle = (row // H)[:, None] * R + tl.arange(0, R // 2)
    cos = tl.load(cos_sin_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(cos_sin_ptr + angle + R // 2, mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)  # [ROWS, R/2, 2]
    tl.store(x_ptr + offset, bf16_bits(tl.reshape(rotated, [ROWS, R])), mask=mask)


def rows_per_program(rope_dims: int) -> int:
    """Heads that one program rotates."""
    return max(1, TILE // rope_dims)


def launch_(x: torch.Tensor, cos_sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    """Run the kernel; arguments are checked."""
    tokens, heads, dims = x.shape
    rope_dims = cos_sin.shape[1]
    if count := tokens * heads:
        rows = rows_per_program(rope_dims)
        kernel: Any = _rope_kernel[(triton.cdiv(count, rows),)]
        constants = {"ROWS": rows, "R": rope_dims, "INVERSE": inverse}
        kernel(x.view(torch.uint16), cos_sin, count, heads, dims, **constants, enable_fp_fusion=False)
    return x


_SIGNATURE = {
    "x_ptr": "*u16",
    "cos_sin_ptr": "*fp32",
    "COUNT": "i32",
    "H": "i32",
    "D": "i32",
    "ROWS": "constexpr",
    "R": "constexpr",
    "INVERSE": "constexpr",
}
# 64 heads, each of which reads the angles of its token.
_ROTATED = TOKENS * 64 * 64 * (2 + 2)
_TRAFFIC = Traffic(_ROTATED + TOKENS * 64 * 64 * 4, _ROTATED + TOKENS * 64 * 4)
COMPILE_CASES = [
    CompileCase(
        f"rope {'inverse' if inverse else 'forward'}",
        _rope_kernel,
        _SIGNATURE,
        {"ROWS": rows_per_program(64), "R": 64, "INVERSE": inverse},
        _TRAFFIC,
        frozenset({"COUNT", "H"}),
    )
    for inverse in (False, True)
]
