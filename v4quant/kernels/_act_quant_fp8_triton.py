"""Triton bodies of act_quant_fp8 and its round trip: one program for a tile of rows and one block of columns."""

from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TOKENS, CompileCase, once
from v4quant.kernels._decoding_triton import e4m3_value
from v4quant.kernels._rounding_triton import bf16_bits, e4m3_byte, e8m0_byte, from_bf16_bits, power_of_two

ROWS = 16
_ODD = frozenset({"M"})


@triton.jit
def _codes(x_ptr, row, block, M, K, BLOCK: tl.constexpr):
    """Codes [ROWS, BLOCK], scale bytes [ROWS], and where they belong: offsets [ROWS, BLOCK], mask [ROWS]."""
    offset = row[:, None] * K + block * BLOCK + tl.arange(0, BLOCK)  # [ROWS, BLOCK]
    mask = row < M
    x = from_bf16_bits(tl.load(x_ptr + offset, mask=mask[:, None], other=0))
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-4)  # [ROWS]
    byte = e8m0_byte(amax, 1 / 448)
    code = e4m3_byte(x * power_of_two(254 - byte)[:, None])  # 1 / scale, exact; a division would not be
    return code, byte, offset, mask


@triton.jit
def _act_quant_fp8_kernel(x_ptr, code_ptr, scale_ptr, M, K, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    block = tl.program_id(1).to(tl.int64)
    code, byte, offset, mask = _codes(x_ptr, row, block, M, K, BLOCK)
    tl.store(code_ptr + offset, code, mask=mask[:, None])
    tl.store(scale_ptr + row * (K // BLOCK) + block, byte.to(tl.uint8), mask=mask)


@triton.jit
def _act_round_fp8_kernel(x_ptr, out_ptr, M, K, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    code, byte, offset, mask = _codes(x_ptr, row, tl.program_id(1).to(tl.int64), M, K, BLOCK)
    value = e4m3_value(code) * power_of_two(byte)[:, None]  # [ROWS, BLOCK]
    tl.store(out_ptr + offset, bf16_bits(value), mask=mask[:, None])


def grid(rows: int, columns: int, block: int) -> tuple[int, int]:
    """Programs for x [rows, columns]."""
    return (triton.cdiv(rows, ROWS), columns // block)


def launch(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; arguments are checked."""
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=x.device)
    scale_e8m0 = torch.empty(rows, columns // block, dtype=torch.uint8, device=x.device)
    if rows:
        kernel: Any = _act_quant_fp8_kernel[grid(rows, columns, block)]
        kernel(x.view(torch.uint16), codes, scale_e8m0, rows, columns, ROWS=ROWS, BLOCK=block)
    return codes.view(torch.float8_e4m3fn), scale_e8m0


def launch_round(x: torch.Tensor, block: int) -> torch.Tensor:
    """Run act_round_fp8; arguments are checked."""
    rows, columns = x.shape
    out = torch.empty_like(x)
    if rows:
        kernel: Any = _act_round_fp8_kernel[grid(rows, columns, block)]
        kernel(x.view(torch.uint16), out.view(torch.uint16), rows, columns, ROWS=ROWS, BLOCK=block)
    return out


_SIGNATURE = {
    "x_ptr": "*u16",
    "code_ptr": "*u8",
    "scale_ptr": "*u8",
    "M": "i32",
    "K": "i32",
    "ROWS": "constexpr",
    "BLOCK": "constexpr",
}
COMPILE_CASES = [
    CompileCase(
        f"act_quant_fp8 {block}",
        _act_quant_fp8_kernel,
        _SIGNATURE,
        {"ROWS": ROWS, "BLOCK": block},
        once(TOKENS * 4096 // block * (block * (2 + 1) + 1)),  # Flash's hidden size
        _ODD,
    )
    for block in (64, 128)
] + [
    CompileCase(
        "act_round_fp8 128",
        _act_round_fp8_kernel,
        {"x_ptr": "*u16", "out_ptr": "*u16", "M": "i32", "K": "i32", "ROWS": "constexpr", "BLOCK": "constexpr"},
        {"ROWS": ROWS, "BLOCK": 128},
        once(TOKENS * 4096 * (2 + 2)),
        _ODD,
    )
]
