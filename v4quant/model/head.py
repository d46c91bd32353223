"""From residual streams to logits, and from token ids to residual streams.

T tokens, S streams of d dims, V vocabulary. The head's product is FP32, as in DeepSeek's released inference code.
"""

from collections.abc import Iterable, Iterator

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
    rows = torch.cat([reader.weights.rows("embed.weight", first, last) for first, last in _runs(ids.tolist())])
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
        self._mix: HyperWeights = reader.hyper(f"{prefix}hc_head")
        self._norm = reader.tensor(f"{prefix}norm.weight")
        self.vocabulary = reader.config.vocab_size
        self._kept = list(self._read()) if keep else None

    def _read(self) -> Iterator[torch.Tensor]:
        for first in range(0, self.vocabulary, _PIECE_ROWS):
            yield self._weights.rows("head.weight", first, min(first + _PIECE_ROWS, self.vocabulary)).to(self._device)

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

    def product(self, x: torch.Tensor, piece: torch.Tensor, ops: Operations | None = None) -> torch.Tensor:
        """Logits of a piece of the vocabulary: float32 [T, some] of collapsed streams [T, d]."""
        return (ops or self._ops).wide_linear(x, piece.float())

    def logits(self, streams: torch.Tensor) -> torch.Tensor:
        """Next-token logits of streams [T, S, d]: float32 [T, V]."""
        x = self.collapse(streams)
        out = torch.empty(len(x), self.vocabulary, device=x.device)
        first = 0
        for piece in self.pieces():
            out[:, first : first + len(piece)] = self.product(x, piece)
            first += len(piece)
        return out
