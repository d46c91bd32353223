"""A reference that runs once and is compared with many candidates: everything that it gave is kept in memory.

For small models alone, such as those of the selftest: streams of every layer, and logits of three runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from v4quant.errors import CheckpointError, V4QuantError
from v4quant.parity.logits import logit_pieces
from v4quant.parity.reference import Alongside, Expected, Pieces
from v4quant.parity.runs import Chunking, Runs


class UnusableReferenceError(CheckpointError):
    """The reference itself cannot be run, so that nothing can be said of any candidate."""


@dataclass
class _Memory:
    """What the reference gave so far, in order."""

    first: torch.Tensor | None = None
    layers: list[Expected] = field(default_factory=list)
    mtp: Expected | None = None
    entered_mtp: bool = False
    logits: dict[int | None, list[list[torch.Tensor]]] = field(default_factory=dict)


class Remembered:
    """A reference that answers from memory what it has been asked before; the first comparison has to be whole."""

    has_noise = True

    def __init__(self, reference: Alongside) -> None:
        self.has_mtp = reference.has_mtp
        self.mtp_blocks = reference.mtp_blocks
        self._reference = reference
        self._memory = _Memory()

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far."""
        return self._reference.bytes_read

    def begin(self, chunking: Chunking, embedding: torch.Tensor) -> torch.Tensor:
        """Streams before layer 0; later chunkings have to be the first one again."""
        if self._memory.first is None:
            self._memory.first = self._reference.begin(chunking, embedding)
        return self._memory.first

    def layer(self, index: int) -> Expected:
        """What it made of a layer."""
        if index == len(self._memory.layers):
            try:
                self._memory.layers.append(self._reference.layer(index))
            except V4QuantError as error:
                raise UnusableReferenceError(
                    f"the checkpoint itself cannot be run: {error}", hint=error.hint
                ) from error
        return self._memory.layers[index]

    def enter_mtp(self, rows: torch.Tensor, chunking: Chunking, last: torch.Tensor) -> None:
        """Once."""
        if not self._memory.entered_mtp:
            self._reference.enter_mtp(rows, chunking, last)
            self._memory.entered_mtp = True

    def mtp(self) -> Expected:
        """What it made of the MTP block."""
        if self._memory.mtp is None:
            self._memory.mtp = self._reference.mtp()
        return self._memory.mtp

    def logits(self, candidate: Runs, last: torch.Tensor, mtp: int | None) -> Pieces:
        """Its logits from memory, the candidate's as they are computed."""
        if mtp not in self._memory.logits:
            self._memory.logits[mtp] = list(logit_pieces(self._reference.collapsed(mtp)))
        theirs = self._memory.logits[mtp]

        def pieces() -> Iterator[list[torch.Tensor]]:
            ours = logit_pieces(candidate.collapsed(mtp, last))
            return ([*own, *other] for own, other in zip(theirs, ours, strict=True))

        return Pieces(pieces(), (3, 0), (4, 0), ((1, 0), (2, 0)))
