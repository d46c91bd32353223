"""Copies that ranks hold of one tensor, told apart while they are read: hashed by each rank, compared by who asks them.

    whole      norms, routers, shared experts, compressors: a copy in every rank of the stage
    rows, columns   where dense parts are shared out, a copy of each share in every one of `ep`
    experts    none

A result shows the first rank's copies alone: what others make of theirs reaches it only where ranks add something up.
"""

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.sharding.rank_tensors import RankTensors
from v4quant.checkpoint.sharding.rules import Split, split_of
from v4quant.checkpoint.weights import Weights
from v4quant.errors import CheckpointError
from v4quant.formats.cast import Array


@dataclass(frozen=True)
class Piece:
    """Bytes that several ranks hold.

    Attributes:
        tensor: its name.
        share: which share of it; 0 where it is whole.
        start, stop: bytes of the share.
    """

    tensor: str
    share: int
    start: int
    stop: int


Copies = Mapping[Piece, tuple[str, str]]
"""What a rank has read of tensors that others hold, too: the file, and the SHA-256 of the bytes."""


class RankWeights(Weights):
    """The tensors of one rank, read as `Weights` reads a checkpoint's."""

    def __init__(self, source: RankTensors) -> None:
        super().__init__(source)
        self._place, self._layout = source.place, source.layout
        self._copies: dict[Piece, tuple[str, str]] = {}
        self._copies_lock = threading.Lock()

    def take_copies(self) -> Copies:
        """What was read since the last time."""
        with self._copies_lock:
            copies, self._copies = self._copies, {}
        return copies

    def _read(self, entry: TensorEntry, into: Array, offset: int = 0) -> None:
        super()._read(entry, into, offset)
        split, grid = split_of(self.source.parsed[entry.name], self._layout), self._place.grid
        copies = {Split.WHOLE: grid.expert_shares, Split.EXPERT: 1}.get(split, grid.ep)
        if copies > 1:
            share = 0 if split is Split.WHOLE else self._place.tp_rank
            digest = hashlib.sha256(into.reshape(-1).view("u1").data).hexdigest()
            with self._copies_lock:
                self._copies[Piece(entry.name, share, offset, offset + into.nbytes)] = entry.file, digest


@dataclass
class CopyCheck:
    """What all ranks have read so far.

    Attributes:
        where: the sharded checkpoint, for messages.
    """

    where: str
    _seen: dict[Piece, tuple[str, str]] = field(default_factory=dict)

    def take(self, copies: Copies) -> None:
        """Compare with what other ranks have read.

        Raises:
            CheckpointError: if a copy is not like another one.
        """
        for piece, (file, digest) in copies.items():
            first, expected = self._seen.setdefault(piece, (file, digest))
            if digest != expected:
                raise CheckpointError(
                    f"{self.where}: {piece.tensor} in {file} differs from its copy in {first}: ranks would compute "
                    "different things",
                    hint=f"Find all such tensors with: v4quant verify {self.where}",
                )
