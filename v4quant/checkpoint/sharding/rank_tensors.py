"""A sharded checkpoint as the forward pass reads it: what each rank holds, under the release's names and dtypes."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from v4quant.checkpoint.files import Source
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.reader import SHARDS_NAME, Checkpoint, open_checkpoint
from v4quant.checkpoint.sharding.folder import ShardedFolder
from v4quant.checkpoint.sharding.grid import Grid, Place
from v4quant.checkpoint.sharding.rules import Layout
from v4quant.checkpoint.sharding.whole import WholeFiles
from v4quant.config import CONFIG_NAME, V4Config
from v4quant.encodings import FP4, FP8_SCHEME, Scheme
from v4quant.errors import CheckpointError
from v4quant.names import TensorName, parse_name


@dataclass(frozen=True)
class RankTensors:
    """What one rank holds; `Weights` reads it as it reads a checkpoint.

    Attributes:
        place: of the rank.
        layout: how ranks lie on disk.
        files: the folder that its files lie in.
        tensors: what it holds, shares with the shape of a share; packed FP4 codes as the release stores them.
        parsed: their names, taken apart.
        scheme: how quantised matrices are stored; one that is BF16 is BF16.
        config: of the whole model.
        run: what tells the run of `shard` from others.
    """

    place: Place
    layout: Layout
    files: Source
    tensors: Mapping[str, TensorEntry]
    parsed: Mapping[str, TensorName]
    scheme: Scheme
    config: V4Config
    run: str

    @property
    def where(self) -> str:
        """The folder, and which rank of it."""
        return f"{self.files.where}: rank {self.place.rank}"

    def source_id(self) -> str:
        """What tells the sharded checkpoint from others without reading data."""
        return self.run

    def require_sound(self) -> None:
        """Nothing to do: what has problems is not opened."""


@dataclass(frozen=True)
class Sharded:
    """A sharded checkpoint.

    Attributes:
        whole: the checkpoint that it was made from, as it is put together from the ranks.
        grid: how its ranks share the model.
        layout: how they lie on disk.
        scheme: how ranks store matrices.
        ranks: what each holds, in rank order.
        run: what tells the run of `shard` from others.
    """

    whole: Checkpoint
    grid: Grid
    layout: Layout
    scheme: Scheme
    ranks: tuple[RankTensors, ...]
    run: str

    @property
    def where(self) -> str:
        """The folder, as the user named it."""
        return self.whole.where

    @property
    def config(self) -> V4Config:
        """Of the whole model."""
        return self.whole.config

    @property
    def release(self) -> str:
        """Name of the release that is stored."""
        return self.whole.release

    @property
    def bytes(self) -> int:
        """Bytes of tensor data in all ranks."""
        return sum(entry.bytes for rank in self.ranks for entry in rank.tensors.values())

    def source_id(self) -> str:
        """What tells this checkpoint from others without reading data."""
        return self.run


def as_stored(checkpoint: Checkpoint) -> Checkpoint | Sharded:
    """A sound checkpoint as it lies on disk: whole, or in ranks.

    Raises:
        CheckpointError: if it has problems, or a rank lacks a part.
    """
    checkpoint.require_sound()
    files = checkpoint.files
    return _sharded(checkpoint, files.folder) if isinstance(files, WholeFiles) else checkpoint


def open_ranks(folder: Path) -> Sharded:
    """Open a folder that `v4quant shard` wrote.

    Raises:
        CheckpointError: if it is none, is not whole, or has problems.
        UsageError: if its config is not that of a supported V4 model.
    """
    found = as_stored(open_checkpoint(folder))
    if not isinstance(found, Sharded):
        raise CheckpointError(f"{folder}: has no {SHARDS_NAME}, expected a folder that v4quant shard wrote")
    return found


def _sharded(whole: Checkpoint, folder: ShardedFolder) -> Sharded:
    run = folder.layout.run
    if hashlib.sha256(whole.config_bytes).hexdigest() != folder.record.files[CONFIG_NAME].sha256:
        raise CheckpointError(
            f"{whole.where}: its {CONFIG_NAME} is not the file that {SHARDS_NAME} tells of",
            hint="Shard the checkpoint again.",
        )
    _require_whole_parts(whole.config, run.grid, whole.where)
    scheme = FP8_SCHEME if run.fp8_experts else whole.scheme
    ranks = []
    for place in run.grid.places:
        entries = {name: _as_released(entry) for name, entry in folder.layout.held_by(place.rank).items()}
        parsed = {name: parts for name in entries if (parts := parse_name(name))}
        ranks.append(RankTensors(place, run.layout, folder.files, entries, parsed, scheme, whole.config, run.id))
    return Sharded(whole, run.grid, run.layout, scheme, tuple(ranks), run.id)


def _require_whole_parts(config: V4Config, grid: Grid, where: str) -> None:
    """Refuse a grid that would cut a head, a group or an expert; `shard` writes none."""
    shared_out = {
        "num_attention_heads": grid.tp,
        "o_groups": grid.tp,
        "index_n_heads": grid.tp,
        "vocab_size": grid.tp,
        "n_routed_experts": grid.expert_shares,
    }
    for key, shares in shared_out.items():
        if getattr(config, key) % shares:
            raise CheckpointError(
                f"{where}: {key} {getattr(config, key):,} does not divide by {shares}, as {grid} has it",
                hint="Shard the checkpoint again.",
            )


def _as_released(entry: TensorEntry) -> TensorEntry:
    """An entry as the release would have it: FP4 codes two a byte, where DeepSeek's layout has their logical shape."""
    if entry.dtype != "F4":
        return entry
    return replace(entry, dtype=FP4.weight_dtype, shape=FP4.storage_shape(entry.shape))
