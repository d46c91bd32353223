"""From residual streams to logits, and from token ids to residual streams.

T tokens, S streams of d dims, V vocabulary. The head's product is FP32, as in DeepSeek's released inference code. Ranks
share the rows of both tables: a row of the embedding comes from the rank that has it; logits lie side by side.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from v4quant.model.chunk import check_ids
from v4quant.model.operations import Operations
from v4quant.model.weights import HyperWeights, Reader

# Rows of the vocabulary read at a time: 64 MiB of BF16 at d = 4096.
_PIECE_ROWS = 8192


def embed(input_ids: torch.Tensor, reader: Reader, ops: Operations) -> torch.Tensor:
    """Embeddings of token ids, int64 [T]: activations [T, d]; only the rows of tokens that occur are read."""
    check_ids(input_ids, reader.config, "input_ids")
    ids, place = torch.unique(input_ids.cpu(), return_inverse=True)
    rows, own = torch.zeros(len(ids), reader.config.hidden_size, dtype=torch.bfloat16), reader.vocabulary
    held = (ids >= own.start) & (ids < own.stop)
    found = [reader.weights.rows("embed.weight", *run) for run in _runs((ids[held] - own.start).tolist())]
    if found:
        rows[held] = torch.cat(found)
    group = reader.ranks.tensor
    if group.size > 1:
        owner, row = ids // len(own), torch.arange(len(ids))
        rows = group.gather(rows.to(reader.device), lambda parts: torch.stack(parts)[owner, row]).cpu()
    return rows[place].to(reader.device).to(ops.dtype)


def streams_of(embeddings: torch.Tensor, count: int) -> torch.Tensor:
    """Residual streams that all begin as the embedding: [T, S, d]."""
    return embeddings[:, None].repeat(1, count, 1)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges [first, last)."""
    first = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield numbers[first], numbers[place - 1] + 1
            first = place


def vocabulary_pieces(vocabulary: int) -> Iterator[range]:
    """Rows of the vocabulary matrix that are read at a time."""
    return (range(first, min(first + _PIECE_ROWS, vocabulary)) for first in range(0, vocabulary, _PIECE_ROWS))


Piece = torch.Tensor | range
"""Some rows of a vocabulary matrix: bfloat16 [some, d], or which ones, where ranks share them."""


class AnyHead(Protocol):
    """A head that is here, or whose ranks are asked."""

    vocabulary: int

    def collapse(self, streams: torch.Tensor, ops: Operations | None = None) -> torch.Tensor:
        """What streams [T, S, d] bring to the vocabulary matrix: float32 [T, d]; `ops` if not the head's own."""

    def pieces(self) -> Iterable[Piece]:
        """The vocabulary matrix piece by piece, in the order of the vocabulary."""

    def product(self, x: torch.Tensor, piece: Piece, ops: Operations | None = None) -> torch.Tensor:
        """Logits of a piece of the vocabulary: float32 [T, some] of collapsed streams [T, d]."""


def logits(head: AnyHead, streams: torch.Tensor) -> torch.Tensor:
    """Next-token logits of streams [T, S, d]: float32 [T, V]."""
    x = head.collapse(streams)
    out = torch.empty(len(x), head.vocabulary, device=x.device)
    first = 0
    for piece in head.pieces():
        out[:, first : first + len(piece)] = head.product(x, piece)
        first += len(piece)
    return out


class Head:
    """Collapse of the streams, norm and vocabulary matrix, of the model or of an MTP block.

    The vocabulary matrix is the model's for both, as in DeepSeek's inference code, which skips the copies that the Base
    releases hold. It is read in pieces whenever logits are asked for, or kept.
    """

    def __init__(self, reader: Reader, ops: Operations, prefix: str = "", *, keep: bool = False) -> None:
        """Read the small parts.

        Args:
            prefix: "" for the model's head, "mtp.0." for that of an MTP block.
            keep: hold the vocabulary matrix in memory.
        """
        self._weights, self._ops, self._device = reader.weights, ops, reader.device
        self._held = reader.vocabulary
        self._mix: HyperWeights = reader.hyper(f"{prefix}hc_head")
        self._norm = reader.tensor(f"{prefix}norm.weight")
        self.vocabulary = reader.config.vocab_size
        self._kept = list(self._read()) if keep else None

    def _read(self) -> Iterator[torch.Tensor]:
        return (self.rows(piece) for piece in vocabulary_pieces(self.vocabulary))

    def rows(self, piece: range) -> torch.Tensor:
        """Those of some rows of the vocabulary matrix that this rank holds: bfloat16 [held, d]."""
        first, stop = max(piece.start, self._held.start), min(piece.stop, self._held.stop)
        first, stop = (min(max(row - self._held.start, 0), len(self._held)) for row in (first, max(first, stop)))
        return self._weights.rows("head.weight", first, stop).to(self._device)

    def collapse(self, streams: torch.Tensor, ops: Operations | None = None) -> torch.Tensor:
        """What streams [T, S, d] bring to the vocabulary matrix: float32 [T, d].

        Args:
            ops: to compute with, if not with the head's own.
        """
        ops = ops or self._ops
        return ops.rms_norm(ops.collapse(streams, self._mix), self._norm).float()  # [T, d]

    def pieces(self) -> Iterable[torch.Tensor]:
        """The vocabulary matrix some rows at a time: bfloat16 [some, d]."""
        return self._read() if self._kept is None else self._kept

    def product(self, x: torch.Tensor, piece: Piece, ops: Operations | None = None) -> torch.Tensor:
        """Logits of a piece of the vocabulary: float32 [T, some] of collapsed streams [T, d]."""
        assert isinstance(piece, torch.Tensor), "a head that is here has its rows"
        return (ops or self._ops).wide_linear(x, piece.float())

    def logits(self, streams: torch.Tensor) -> torch.Tensor:
        """Next-token logits of streams [T, S, d]: float32 [T, V]."""
        return logits(self, streams)
