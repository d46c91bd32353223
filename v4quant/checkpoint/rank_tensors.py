"""A sharded checkpoint as the forward pass reads it: what each rank holds, under the release's names and dtypes.

`open_sharded` believes nothing but what can be checked: the folder is one whole run of `shard` (tp_folder.py), the
headers of the checkpoint that it was made from fit the config, and so every share has the shape that it must have.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from v4quant.checkpoint.audit import audit_config, audit_tensors, summarise
from v4quant.checkpoint.certificate import CERTIFICATE_NAME
from v4quant.checkpoint.detect import Entries, Parsed, detect_scheme
from v4quant.checkpoint.files import Files
from v4quant.checkpoint.grid import Grid, Place
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.reader import SHARDS_NAME, Checkpoint, open_checkpoint
from v4quant.checkpoint.tp_folder import TpFolder, open_tp_folder
from v4quant.checkpoint.tp_layout import EXTRA_NAME, FILE_PREFIX
from v4quant.config import CONFIG_NAME, MAX_CONFIG_BYTES, V4Config, parse_config_json
from v4quant.encodings import FP4, FP8_SCHEME, Scheme
from v4quant.errors import CheckpointError
from v4quant.inventory import release_name
from v4quant.names import TensorName, parse_name

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class RankTensors:
    """What one rank holds; `Weights` reads it as it reads a checkpoint.

    Attributes:
        place: of the rank.
        files: the folder that its files lie in.
        tensors: what it holds, shares with the shape of a share; packed FP4 codes as the release stores them.
        parsed: their names, taken apart.
        scheme: how quantised matrices are stored; one that is BF16 is BF16.
        config: of the whole model.
        source: what tells the run of `shard` from others: a hash.
    """

    place: Place
    files: Files
    tensors: Mapping[str, TensorEntry]
    parsed: Mapping[str, TensorName]
    scheme: Scheme
    config: V4Config
    source: str

    @property
    def where(self) -> str:
        """The folder, and which rank of it."""
        return f"{self.files.where}: rank {self.place.rank}"

    def source_id(self) -> str:
        """What tells the sharded checkpoint from others without reading data."""
        return self.source

    def require_sound(self) -> None:
        """Nothing to do: `open_sharded` opens nothing that is not sound."""


@dataclass(frozen=True)
class Sharded:
    """A sharded checkpoint.

    Attributes:
        where: the folder, as the user named it.
        grid: how its ranks share the model.
        config: of the whole model.
        scheme: how ranks store matrices.
        ranks: what each holds, in rank order.
        source: what tells the run of `shard` from others: a hash.
        sha256: of files of the checkpoint that it was made from, by name.
    """

    where: str
    grid: Grid
    config: V4Config
    scheme: Scheme
    ranks: tuple[RankTensors, ...]
    source: str
    sha256: Mapping[str, str]

    @property
    def release(self) -> str:
        """Name of the release that is stored."""
        return release_name(self.config, self.scheme)

    @property
    def bytes(self) -> int:
        """Bytes of tensor data in all ranks."""
        return sum(entry.bytes for rank in self.ranks for entry in rank.tensors.values())

    def source_id(self) -> str:
        """What tells this checkpoint from others without reading data."""
        return self.source


def open_stored(folder: Path) -> Checkpoint | Sharded:
    """Open a checkpoint, whole, or sharded by `v4quant shard`; no tensor data is read.

    Raises:
        CheckpointError: if it is none, has problems, or is not whole.
        UsageError: if its config is not that of a supported V4 model.
    """
    if (folder / SHARDS_NAME).is_file():
        return open_sharded(folder)
    checkpoint = open_checkpoint(folder)
    checkpoint.require_sound()
    return checkpoint


def open_sharded(folder: Path) -> Sharded:
    """Open a folder that `v4quant shard` wrote; no tensor data is read.

    Raises:
        CheckpointError: if it is not whole, damaged, of several runs, or made from a checkpoint that contradicts
            itself.
        UsageError: if its config is not that of a supported V4 model.
    """
    return _of_tp_folder(open_tp_folder(folder))


def _of_tp_folder(folder: TpFolder) -> Sharded:
    """DeepSeek's flat layout: a file a rank."""
    files, record, layout = folder.files, folder.record, folder.layout
    config = _config(folder)
    sources = {place.source.name: place.source for places in layout.placements.values() for place in places}
    scheme = _checked_scheme(config, sources, files.where)
    scheme = FP8_SCHEME if record.fp8_experts else scheme
    grid = Grid(record.ranks)
    _require_whole_parts(config, grid, files.where)
    ranks = []
    for place, shard in zip(grid.places, layout.files[: record.ranks], strict=True):
        entries = {name: _as_released(entry) for name, entry in shard.entries.items()}
        ranks.append(RankTensors(place, files, entries, _parsed(entries), scheme, config, record.run))
    names = (CONFIG_NAME, INDEX_NAME, CERTIFICATE_NAME)
    sha256 = {name: record.files[name].sha256 for name in names if name in record.files}
    return Sharded(files.where, grid, config, scheme, tuple(ranks), record.run, sha256)


def _config(folder: TpFolder) -> V4Config:
    """The checkpoint's config.json, which the extra file keeps."""
    where = f"{folder.where}/{EXTRA_NAME}: {FILE_PREFIX}{CONFIG_NAME}"
    entry, recorded = folder.layout.extra.entries[FILE_PREFIX + CONFIG_NAME], folder.record.files[CONFIG_NAME]
    if entry.bytes > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{where}: has {entry.bytes:,} bytes, expected at most {MAX_CONFIG_BYTES:,}")
    data = folder.files.read(EXTRA_NAME, entry.start, entry.stop)
    if hashlib.sha256(data).hexdigest() != recorded.sha256:
        raise CheckpointError(
            f"{where}: is not the file that {SHARDS_NAME} tells of", hint="Shard the checkpoint again."
        )
    return V4Config.from_json(parse_config_json(data, where), where)


def _checked_scheme(config: V4Config, sources: Entries, where: str) -> Scheme:
    """How the checkpoint stored its matrices; its headers must be those of a sound one."""
    parsed = _parsed(sources)
    scheme = detect_scheme(sources, parsed, where)
    problems = [*audit_config(config, scheme, sources, parsed), *audit_tensors(config, scheme, sources, parsed)]
    if problems:
        shown = [text for text, _ in summarise(problems, _SHOWN_PROBLEMS)]
        raise CheckpointError(
            f"{where}: was made from a checkpoint with {len(problems):,} problems:\n  " + "\n  ".join(shown),
            hint="Shard a checkpoint that v4quant inspect finds sound.",
        )
    return scheme


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


def _parsed(entries: Entries) -> Parsed:
    return {name: parts for name in entries if (parts := parse_name(name))}


def _as_released(entry: TensorEntry) -> TensorEntry:
    """An entry as the release would have it: FP4 codes two a byte, where this layout gives their logical shape."""
    if entry.dtype != "F4":
        return entry
    return replace(entry, dtype=FP4.weight_dtype, shape=FP4.storage_shape(entry.shape))
