"""Compressed KV entries: each channel is a softmax-weighted mean over the tokens of a window.

    z_r = score_r + ape[p_r % R]                              p_r: the position of token r
    entry = bf16(sum_r softmax_r(z_r) kv_r), each channel for itself

R = 128 (HCA): over the R tokens of a window, C = D. R = 4 (CSA and the indexer): windows overlap, C = 2 D, over 2 R
tokens, of which the R before the window give columns [:D] and those of the window [D:]. Before the first window there
is nothing, score -inf. An entry comes into being with the last token of its window, (p + 1) % R == 0.

T tokens, E entries, S sequences, D the width of an entry (512, or 128 in the indexer), M = C / D (1 or 2). Source:
`Compressor.forward` of DeepSeek's released inference code. Its decode state is the one here but for the place of rows:
there rows move up after an overlapping window, here the token of position p stays in row p % (M R).
"""

from dataclasses import dataclass

import torch

from v4quant.kernels._backend import require, use_triton

OVERLAPPING_RATIO = 4
RATIOS = (4, 128)


@dataclass(frozen=True)
class CompressorState:
    """The last M R tokens of some sequences, from which later tokens make entries.

    Attributes:
        kv: float32 [S, M R, C].
        score: float32 [S, M R, C], position bias included; -inf where there was no token yet.
    """

    kv: torch.Tensor
    score: torch.Tensor

    @classmethod
    def empty(cls, sequences: int, ratio: int, dim: int, device: torch.device | str = "cpu") -> "CompressorState":
        """State of sequences that have not begun."""
        parts = 2 if ratio == OVERLAPPING_RATIO else 1
        kv = torch.zeros(sequences, parts * ratio, parts * dim, device=device)
        return cls(kv, torch.full_like(kv, -torch.inf))

    def reset_(self, sequence: int) -> None:
        """Begin a sequence anew."""
        self.kv[sequence] = 0.0
        self.score[sequence] = -torch.inf


def window_ends(positions: torch.Tensor, ratio: int) -> torch.Tensor:
    """Rows of the tokens that complete a window: int32 [E] of positions, integers [T]."""
    return ((positions + 1) % ratio == 0).nonzero()[:, 0].to(torch.int32)


def compress_kv_torch(
    kv: torch.Tensor,
    score: torch.Tensor,
    ape: torch.Tensor,
    state: CompressorState,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Reference for compress_kv: same arguments, any device; equal up to the order of FP32 sums."""
    return pool_windows(kv, score, ape, state, sequences, positions, ends).to(torch.bfloat16)


def pool_windows(
    kv: torch.Tensor,
    score: torch.Tensor,
    ape: torch.Tensor,
    state: CompressorState,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """The entries before they are rounded: float32 [E, D]; arguments as for compress_kv."""
    ratio, columns = ape.shape
    tokens = state.kv.shape[1]  # M R
    dim = columns * ratio // tokens
    back = torch.arange(tokens - 1, -1, -1, device=kv.device)
    sequence = sequences[ends].long()[:, None]  # [E, 1]
    position = positions[ends].long()[:, None] - back  # [E, M R]
    row = (ends.long()[:, None] - back).clamp(min=0)
    here = (sequences[row] == sequence) & (positions[row] == position)  # tokens of this call; others lie in the state
    phase, place = position % ratio, position % tokens
    out_kv, out_score = [], []
    # The older R tokens of an overlapping window give the first D columns, those of the window the last D.
    for part in range(tokens // ratio):
        old, new = slice(part * ratio, (part + 1) * ratio), slice(part * dim, (part + 1) * dim)
        chosen = here[:, old, None]
        fresh = score[:, new][row[:, old]] + ape[:, new][phase[:, old]]  # [E, R, D]
        out_score.append(torch.where(chosen, fresh, state.score[..., new][sequence, place[:, old]]))
        out_kv.append(torch.where(chosen, kv[:, new][row[:, old]], state.kv[..., new][sequence, place[:, old]]))
    weight = torch.cat(out_score, 1).softmax(1)  # [E, M R, D]
    return (torch.cat(out_kv, 1) * weight).sum(1)


def compress_kv(
    kv: torch.Tensor,
    score: torch.Tensor,
    ape: torch.Tensor,
    state: CompressorState,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Make the entries whose windows end in this call; call compressor_append_ afterwards.

    A call holds any mixture of prefills, pieces of prefills and decode steps: the tokens of a sequence lie together, in
    order, and continue where its state ends.

    Args:
        kv: float32 [T, C], the output of wkv.
        score: float32 [T, C], the output of wgate.
        ape: float32 [R, C], the learned bias of a position in its window.
        state: of all sequences.
        sequences: int32 [T], the row of a token's sequence in the state.
        positions: int32 [T], a token's place in its sequence.
        ends: int32 [E], window_ends(positions, R) or a part of it.

    Returns:
        bfloat16 [E, D], not yet normalised.

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    _check(kv, score, ape, state, sequences, positions)
    require("ends", ends, torch.int32, (None,))
    if not use_triton(kv):
        return compress_kv_torch(kv, score, ape, state, sequences, positions, ends)
    from v4quant.kernels._compress_kv_triton import launch

    return launch(kv, score, ape, state, sequences, positions, ends)


def compressor_append_torch_(
    kv: torch.Tensor,
    score: torch.Tensor,
    ape: torch.Tensor,
    state: CompressorState,
    sequences: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Reference for compressor_append_: same arguments, same bits, any device."""
    rows = state.kv.shape[1]
    # Of tokens that would share a row, only the last one.
    last = torch.ones(len(kv), dtype=torch.bool, device=kv.device)
    last[:-rows] = (sequences[rows:] != sequences[:-rows]) | (positions[rows:] != positions[:-rows] + rows)
    sequence, position = sequences[last].long(), positions[last].long()
    state.kv[sequence, position % rows] = kv[last]
    state.score[sequence, position % rows] = score[last] + ape[position % ape.shape[0]]


def compressor_append_(
    kv: torch.Tensor,
    score: torch.Tensor,
    ape: torch.Tensor,
    state: CompressorState,
    sequences: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Take a call's tokens into the state.

    Args: as for compress_kv; the state is changed.

    Raises:
        TypeError, ValueError: as compress_kv.
    """
    _check(kv, score, ape, state, sequences, positions)
    if not use_triton(kv):
        compressor_append_torch_(kv, score, ape, state, sequences, positions)
        return
    from v4quant.kernels._compress_kv_triton import launch_append_

    launch_append_(kv, score, ape, state, sequences, positions)


def _check(
    kv: torch.Tensor,
    score: torch.Tensor,
    ape: torch.Tensor,
    state: CompressorState,
    sequences: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    require("kv", kv, torch.float32, (None, None))
    tokens, columns = kv.shape
    require("score", score, torch.float32, (tokens, columns))
    require("ape", ape, torch.float32, (None, columns))
    ratio = ape.shape[0]
    parts = 2 if ratio == OVERLAPPING_RATIO else 1
    if ratio not in RATIOS or columns % (64 * parts):
        raise ValueError(f"ape has shape {list(ape.shape)}, expected 4 rows of 2 D or 128 of D, D a multiple of 64")
    require("state.kv", state.kv, torch.float32, (None, parts * ratio, columns))
    require("state.score", state.score, torch.float32, tuple(state.kv.shape))
    require("sequences", sequences, torch.int32, (tokens,))
    require("positions", positions, torch.int32, (tokens,))
