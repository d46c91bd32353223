"""Triton body of hadamard: one program for a tile of whole rows."""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TOKENS, CompileCase, once
from v4quant.kernels._rounding_triton import bf16_bits, from_bf16_bits

TILE = 4096  # elements of a program


@triton.jit
def _hadamard_kernel(x_ptr, out_ptr, M, ROWS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr, SCALE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    offset = row[:, None] * D + tl.arange(0, D)  # [ROWS, D]
    mask = (row < M)[:, None]
    y = from_bf16_bits(tl.load(x_ptr + offset, mask=mask, other=0))
    for stage in tl.static_range(STAGES):
        groups = tl.reshape(y, [ROWS, D >> (stage + 1), 2, 1 << stage])
        first, second = tl.split(tl.permute(groups, [0, 1, 3, 2]))  # [ROWS, D/2s, s]
        groups = tl.permute(tl.join(first + second, first - second), [0, 1, 3, 2])
        y = tl.reshape(groups, [ROWS, D])
    tl.store(out_ptr + offset, bf16_bits(y * SCALE), mask=mask)


def rows_per_program(columns: int) -> int:
    """Rows that one program takes."""
    return max(1, TILE // columns)


def launch(x: torch.Tensor) -> torch.Tensor:
    """Run the kernel; arguments are checked."""
    rows, columns = x.shape
    out = torch.empty_like(x)
    if rows:
        tile = rows_per_program(columns)
        kernel: Any = _hadamard_kernel[(triton.cdiv(rows, tile),)]
        kernel(x.view(torch.uint16), out.view(torch.uint16), rows, **_constants(columns), enable_fp_fusion=False)
    return out


def _constants(columns: int) -> dict[str, Any]:
    return {
        "ROWS": rows_per_program(columns),
        "D": columns,
        "STAGES": columns.bit_length() - 1,
        "SCALE": 1 / math.sqrt(columns),
    }


_SIGNATURE = {
    "x_ptr": "*u16",
    "out_ptr": "*u16",
    "M": "i32",
    **dict.fromkeys(["ROWS", "D", "STAGES", "SCALE"], "constexpr"),
}
# The indexer's queries, 64 heads of 128.
COMPILE_CASES = [
    CompileCase(
        "hadamard 128",
        _hadamard_kernel,
        _SIGNATURE,
        _constants(128),
        once(TOKENS * 64 * 128 * (2 + 2)),
        frozenset({"M"}),
    )
]
