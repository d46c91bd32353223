"""The tensors of a sharded checkpoint, whole again: shares are put together as they are read.

    rows      one rank's below the other's: heads of wq_b, groups of wo_a, the vocabulary
    columns   side by side: wo_b
    experts   from the rank that has them; all else from the first rank that holds it

For a look at what the ranks compute with, without running them. Where the whole checkpoint is put together
(whole.py), what ranks hold in another form, such as wo_a in BF16, comes from the extra file, and a fault in the
ranks would not be seen.
"""

import torch

from v4quant.checkpoint.sharding.rank_tensors import Sharded
from v4quant.checkpoint.sharding.rules import Split, split_of
from v4quant.checkpoint.weights import Buffers, StoredMatrix, Weights
from v4quant.encodings import Encoding, Scheme
from v4quant.errors import CheckpointError
from v4quant.names import parse_name

_AXES = {Split.ROWS: 0, Split.COLUMNS: 1}


class JoinedWeights:
    """Reads as `Weights` does; safe from any thread."""

    def __init__(self, sharded: Sharded) -> None:
        self.scheme: Scheme = sharded.scheme
        self._where, self._layout = sharded.where, sharded.layout
        self._ranks = [(own.place, Weights(own)) for own in sharded.ranks]

    @property
    def bytes_read(self) -> int:
        """Stored bytes read so far."""
        return sum(weights.bytes_read for _, weights in self._ranks)

    def has(self, name: str) -> bool:
        """True if any rank stores this tensor."""
        return any(weights.has(name) for _, weights in self._ranks)

    def ranks_of(self, name: str) -> list[int]:
        """Numbers of the ranks that hold a tensor or a part of it."""
        return [place.rank for place, weights in self._ranks if weights.has(name)]

    def encoding(self, module: str) -> Encoding:
        """As Weights.encoding."""
        return self._parts(f"{module}.weight")[0][0].encoding(module)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor.

        Raises:
            CheckpointError: if there is none of this name.
        """
        parts, axis = self._parts(name)
        shape = list(parts[0].shape(name))
        shape[axis] *= len(parts)
        return tuple(shape)

    def tensor(self, name: str) -> torch.Tensor:
        """As Weights.tensor."""
        parts, axis = self._parts(name)
        return _joined([own.tensor(name) for own in parts], axis)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As Weights.rows."""
        parts, axis = self._parts(name)
        assert axis == 0, "rows are asked of what is cut by rows"
        each, found = parts[0].shape(name)[0], []
        for number, own in enumerate(parts):
            first, last = max(start - number * each, 0), min(stop - number * each, each)
            if first < last or (start == stop and not number):
                found.append(own.rows(name, first, max(first, last)))
        return _joined(found, 0)

    def matrix(self, module: str, buffers: Buffers | None = None) -> torch.Tensor:
        """As Weights.matrix; one that is cut is put together in memory of its own."""
        parts, axis = self._parts(f"{module}.weight")
        if len(parts) == 1:
            return parts[0].matrix(module, buffers)
        return _joined([own.matrix(module) for own in parts], axis)

    def stored(self, module: str, buffers: Buffers) -> StoredMatrix:
        """As Weights.stored, of a matrix that is not cut: a routed expert's."""
        (own,), _ = self._parts(f"{module}.weight")
        return own.stored(module, buffers)

    def codes(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """As Weights.codes."""
        parts, axis = self._parts(f"{module}.weight")
        pairs = [own.codes(module) for own in parts]
        return _joined([codes for codes, _ in pairs], axis), _joined([scale for _, scale in pairs], axis)

    def _parts(self, name: str) -> tuple[list[Weights], int]:
        """Those that hold the parts of a tensor, in order, and the axis along which they lie.

        Raises:
            CheckpointError: if no rank has it.
        """
        holders = [(place, weights) for place, weights in self._ranks if weights.has(name)]
        parsed = parse_name(name)
        if not holders or parsed is None:
            raise CheckpointError(f"{self._where}: no rank has a tensor {name}", hint="Shard the checkpoint again.")
        first = holders[0][0]
        axis = _AXES.get(split_of(parsed, self._layout))
        if axis is None:
            return [holders[0][1]], 0
        return [own for place, own in holders if (place.stage, place.ep_rank) == (first.stage, first.ep_rank)], axis


def _joined(parts: list[torch.Tensor], axis: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
