"""Triton bodies of compress_kv: one program for an entry and a block of its channels; one for a token's row."""

from typing import Any

import torch
import triton
import triton.language as tl

from v4quant.kernels._compile_case import TOKENS, CompileCase, Traffic
from v4quant.kernels._rounding_triton import bf16_bits
from v4quant.kernels.compress_kv import OVERLAPPING_RATIO, CompressorState

COLUMNS = 64
APPEND_COLUMNS = 512
# 64 channels are 16 threads wide in loads of 128 bits; tokens go over the others.
NUM_WARPS = {4: 1, 128: 8}


@triton.jit
def _compress_kv_kernel(
    kv_ptr,
    score_ptr,
    ape_ptr,
    state_kv_ptr,
    state_score_ptr,
    sequence_ptr,
    position_ptr,
    end_ptr,
    out_ptr,
    D,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    count: tl.constexpr = PARTS * R
    blocks = D // COLUMNS
    entry = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(end_ptr + entry)
    sequence = tl.load(sequence_ptr + end)
    token = tl.arange(0, count)
    position = tl.load(position_ptr + end) - (count - 1) + token  # [PARTS R]
    row = end - (count - 1) + token
    here = (row >= 0) & (tl.load(sequence_ptr + row, mask=row >= 0, other=-1) == sequence)
    here = here & (tl.load(position_ptr + row, mask=row >= 0, other=-1) == position)
    # Older tokens of an overlapping window give the first D columns. Positions before the first are below zero.
    source = (token // R * D)[:, None] + column  # [PARTS R, COLUMNS]
    width = PARTS * D
    fresh = row.to(tl.int64)[:, None] * width + source
    place = (position + count) % count
    kept = (sequence.to(tl.int64) * count + place)[:, None] * width + source
    bias = ((position + count) % R)[:, None] * width + source
    mask = here[:, None]
    score = tl.load(score_ptr + fresh, mask=mask, other=0.0) + tl.load(ape_ptr + bias, mask=mask, other=0.0)
    score = tl.where(mask, score, tl.load(state_score_ptr + kept, mask=~mask, other=0.0))
    kv = tl.load(kv_ptr + fresh, mask=mask, other=0.0)
    kv = tl.where(mask, kv, tl.load(state_kv_ptr + kept, mask=~mask, other=0.0))
    weight = tl.exp(score - tl.max(score, axis=0)[None, :])
    weight = weight / tl.sum(weight, axis=0)[None, :]
    tl.store(out_ptr + entry * D + column, bf16_bits(tl.sum(kv * weight, axis=0)))


@triton.jit
def _compressor_append_kernel(
    kv_ptr,
    score_ptr,
    ape_ptr,
    state_kv_ptr,
    state_score_ptr,
    sequence_ptr,
    position_ptr,
    T,
    C,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Last token first: where programs run in order, as interpreted, a missing check below shows.
    token = T - 1 - tl.program_id(0)
    sequence = tl.load(sequence_ptr + token)
    position = tl.load(position_ptr + token)
    # A later token of this call takes the same row: leave it to that one.
    later = token + ROWS < T
    latest = tl.load(sequence_ptr + token + ROWS, mask=later, other=-1) != sequence
    latest |= tl.load(position_ptr + token + ROWS, mask=later, other=-1) != position + ROWS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < tl.where(latest, C, 0)
    source = token.to(tl.int64) * C + column
    target = (sequence.to(tl.int64) * ROWS + position % ROWS) * C + column
    score = tl.load(score_ptr + source, mask=mask, other=0.0)
    score += tl.load(ape_ptr + position % R * C + column, mask=mask, other=0.0)
    tl.store(state_score_ptr + target, score, mask=mask)
    tl.store(state_kv_ptr + target, tl.load(kv_ptr + source, mask=mask, other=0.0), mask=mask)


def launch(
    kv: torch.Tensor,
    score: torch.Tensor,
    ape: torch.Tensor,
    state: CompressorState,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Run the kernel; arguments are checked."""
    ratio, columns = ape.shape
    parts = state.kv.shape[1] // ratio
    dim = columns // parts
    out = torch.empty(len(ends), dim, dtype=torch.bfloat16, device=kv.device)
    if len(ends):
        kernel: Any = _compress_kv_kernel[(len(ends) * (dim // COLUMNS),)]
        tensors = (kv, score, ape, state.kv, state.score, sequences, positions, ends, out.view(torch.uint16))
        options = {"num_warps": NUM_WARPS[ratio], "enable_fp_fusion": False}
        kernel(*tensors, dim, R=ratio, PARTS=parts, COLUMNS=COLUMNS, **options)
    return out


def launch_append_(
    kv: torch.Tensor,
    score: torch.Tensor,
    ape: torch.Tensor,
    state: CompressorState,
    sequences: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Run the kernel; arguments are checked."""
    tokens, columns = kv.shape
    if tokens:
        kernel: Any = _compressor_append_kernel[(tokens, triton.cdiv(columns, APPEND_COLUMNS))]
        tensors = (kv, score, ape, state.kv, state.score, sequences, positions)
        sizes = {"R": ape.shape[0], "ROWS": state.kv.shape[1], "BLOCK": APPEND_COLUMNS}
        kernel(*tensors, tokens, columns, **sizes, enable_fp_fusion=False)


_FLOATS = dict.fromkeys(["kv_ptr", "score_ptr", "ape_ptr", "state_kv_ptr", "state_score_ptr"], "*fp32")
_COMPRESS = {
    **_FLOATS,
    **dict.fromkeys(["sequence_ptr", "position_ptr", "end_ptr"], "*i32"),
    "out_ptr": "*u16",
    "D": "i32",
    "R": "constexpr",
    "PARTS": "constexpr",
    "COLUMNS": "constexpr",
}
_APPEND = {
    **_FLOATS,
    "sequence_ptr": "*i32",
    "position_ptr": "*i32",
    "T": "i32",
    "C": "i32",
    "R": "constexpr",
    "ROWS": "constexpr",
    "BLOCK": "constexpr",
}


def _compress_traffic(ratio: int, parts: int) -> Traffic:
    """Of the entries of a prefill chunk; windows that overlap read every token for two of them."""
    entries, count = TOKENS // ratio, parts * ratio
    places = 8 * count + 12  # sequence and position of each token, of the last one, and where that is
    moved = entries * (count * 512 * 3 * 4 + 512 * 2 + 512 // COLUMNS * places)
    return Traffic(moved, TOKENS * (parts * 512 * 2 * 4 + 8) + ratio * parts * 512 * 4 + entries * (512 * 2 + 4))


def _append_traffic(ratio: int, parts: int) -> Traffic:
    """Of a decode step of 64 sequences: kv, score and ape read, kv and score written."""
    row = parts * 512 * 4
    programs = row // 4 // APPEND_COLUMNS
    return Traffic(64 * (5 * row + 16 * programs), 64 * (4 * row + 8) + min(64, ratio) * row)


COMPILE_CASES = [
    case
    for ratio in (4, 128)
    for parts in (2 if ratio == OVERLAPPING_RATIO else 1,)
    for case in (
        CompileCase(
            f"compress_kv {ratio}",
            _compress_kv_kernel,
            _COMPRESS,
            {"R": ratio, "PARTS": parts, "COLUMNS": COLUMNS},
            _compress_traffic(ratio, parts),
            num_warps=NUM_WARPS[ratio],
        ),
        CompileCase(
            f"compressor_append {ratio}",
            _compressor_append_kernel,
            _APPEND,
            {"R": ratio, "ROWS": parts * ratio, "BLOCK": APPEND_COLUMNS},
            _append_traffic(ratio, parts),
            frozenset({"T"}),
        ),
    )
]
