"""Triton bodies of top_k: one program for a row finds the K-th score by its two bytes and collects; another sorts."""

from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TOKENS, CompileCase, Traffic

BLOCK = 2048


@triton.jit
def _ordered(bits):
    """Integers 0 to 65535 in the order of BF16 numbers, from their bits."""
    value = bits.to(tl.int32)
    value = tl.where(value == 0x8000, 0, value)
    return tl.where(value >= 0x8000, 0xFFFF - value, value + 0x8000)


@triton.jit
def _last_bin(count, needed):
    """The last of 256 bins from which on there are `needed` elements or more, and how many lie beyond it."""
    bins = tl.arange(0, 256)
    chosen = tl.sum((tl.cumsum(count, axis=0, reverse=True) >= needed).to(tl.int32)) - 1
    return chosen, tl.sum(tl.where(bins > chosen, count, 0))


@triton.jit
def _select_kernel(score_ptr, visible_ptr, picked_ptr, N, K, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the K best of a row, in no order, as (65535 - ordered score) << 32 | index."""
    row = tl.program_id(0).to(tl.int64)
    visible = tl.load(visible_ptr + row)
    # Loads reach up to N, which is a multiple of 16 more often than `visible` is, and so makes them wide.
    score_ptr += row * N
    picked_ptr += row * WIDTH
    threshold = -1
    equal_left = 0
    beyond = 0
    if visible > K:
        count = tl.zeros([256], tl.int32)
        for start in range(0, visible, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = _ordered(tl.load(score_ptr + column, mask=column < N, other=0))
            count += tl.histogram(value >> 8, 256, mask=column < visible)
        high, beyond_high = _last_bin(count, K)
        count = tl.zeros([256], tl.int32)
        for start in range(0, visible, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = _ordered(tl.load(score_ptr + column, mask=column < N, other=0))
            count += tl.histogram(value & 255, 256, mask=(column < visible) & ((value >> 8) == high))
        low, beyond_low = _last_bin(count, K - beyond_high)
        threshold = high * 256 + low
        beyond = beyond_high + beyond_low
        equal_left = K - beyond
    greater_before = 0
    equal_before = 0
    for start in range(0, visible, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < visible
        value = _ordered(tl.load(score_ptr + column, mask=column < N, other=0))
        greater = (mask & (value > threshold)).to(tl.int32)
        equal = (mask & (value == threshold)).to(tl.int32)
        greater_place = greater_before + tl.cumsum(greater, axis=0) - 1
        equal_place = equal_before + tl.cumsum(equal, axis=0) - 1
        taken = (greater != 0) | ((equal != 0) & (equal_place < equal_left))
        place = tl.where(greater != 0, greater_place, beyond + equal_place)
        tl.store(picked_ptr + place, ((0xFFFF - value).to(tl.int64) << 32) | column, mask=taken)
        greater_before += tl.sum(greater)
        equal_before += tl.sum(equal)


@triton.jit
def _sort_kernel(picked_ptr, visible_ptr, out_ptr, K, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    count = tl.minimum(tl.load(visible_ptr + row), K)
    picked = tl.load(picked_ptr + row * WIDTH + column)
    picked = tl.sort(tl.where(column < count, picked, 0x7FFFFFFFFFFFFFFF))
    index = tl.where(column < count, picked.to(tl.int32), -1)
    tl.store(out_ptr + row * K + column, index, mask=column < K)


def launch(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    """Run the kernels; arguments are checked."""
    rows, entries = scores.shape
    width = _width(k)
    picked = torch.empty(rows, width, dtype=torch.int64, device=scores.device)
    out = torch.empty(rows, k, dtype=torch.int32, device=scores.device)
    if rows:
        select: Any = _select_kernel[(rows,)]
        select(scores.view(torch.uint16), visible, picked, entries, k, WIDTH=width, BLOCK=BLOCK, num_warps=8)
        sort: Any = _sort_kernel[(rows,)]
        sort(picked, visible, out, k, WIDTH=width)
    return out


def _width(k: int) -> int:
    return max(256, 1 << (k - 1).bit_length())


_SELECT = {
    "score_ptr": "*u16",
    "visible_ptr": "*i32",
    "picked_ptr": "*i64",
    "N": "i32",
    "K": "i32",
    "WIDTH": "constexpr",
    "BLOCK": "constexpr",
}
_SORT = {"picked_ptr": "*i64", "visible_ptr": "*i32", "out_ptr": "*i32", "K": "i32", "WIDTH": "constexpr"}
_ENTRIES = 4096  # of a context of 16,384 tokens


def _select_traffic(k: int) -> Traffic:
    """Scores are read three times: for either byte of the K-th score, and to collect."""
    rest = TOKENS * (4 + k * 8)
    return Traffic(rest + 3 * TOKENS * _ENTRIES * 2, rest + TOKENS * _ENTRIES * 2)


def _sort_traffic(k: int) -> Traffic:
    return Traffic(TOKENS * (4 + _width(k) * 8 + k * 4), TOKENS * (4 + k * 8 + k * 4))


# Pro picks 1024; Flash, with 512, sorts less and selects alike.
COMPILE_CASES = [
    CompileCase(
        "top_k select 1024",
        _select_kernel,
        _SELECT,
        {"WIDTH": _width(1024), "BLOCK": BLOCK},
        _select_traffic(1024),
        num_warps=8,
    ),
    CompileCase(
        "top_k sort 1024",
        _sort_kernel,
        _SORT,
        {"WIDTH": _width(1024)},
        _sort_traffic(1024),
        targets=("sm_80", "gfx942"),  # seconds to compile, and newer NVIDIA GPUs get the same instructions
    ),
]
