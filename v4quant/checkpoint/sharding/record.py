"""`v4quant.shards.json`: what a sharded folder was made from, how, and the hash of every file of the checkpoint.

Written last by `shard`, so a folder that has it is whole. `merge` gives back exactly the files that it lists. It holds
no time and no path: the same checkpoint gives the same file on every machine. Read as hostile input.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from v4quant import strict_json
from v4quant.checkpoint.files import MAX_FILES, Files
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.layout import Packing
from v4quant.checkpoint.reader import JOURNAL_NAME, SHARDS_NAME
from v4quant.checkpoint.sharding.grid import MAX_RANKS, Grid
from v4quant.checkpoint.sharding.rank_files import Run
from v4quant.checkpoint.sharding.rules import Layout
from v4quant.config import CONFIG_NAME
from v4quant.errors import CheckpointError

RECORD_VERSION = 2
# A release has about a hundred files, each of them two lines.
MAX_RECORD_BYTES = 64 * 2**20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_COMPONENT = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,250}")
_HINT = "Shard the checkpoint again; this file was edited or damaged."


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the checkpoint.

    Attributes:
        file: its name.
        bytes: its size.
        sha256: of all of it.
        rounded: tensors in it that the ranks hold rounded (wo_a as BF16, under F32 scales that are no powers of two).
    """

    file: str
    bytes: int
    sha256: str
    rounded: int = 0

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object, for the journal."""
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256, "rounded": self.rounded}

    @classmethod
    def from_json(cls, entry: object, where: str) -> "FileRecord":
        """Read a journal's record back.

        Raises:
            CheckpointError: if it is none.
        """
        kinds = {"file": str, "bytes": int, "sha256": str, "rounded": int}
        if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != kinds:
            raise CheckpointError(f"{where}: not a line that v4quant writes", hint="Remove the folder and start again.")
        return cls(**entry)


@dataclass(frozen=True)
class ShardsRecord:
    """What v4quant.shards.json says.

    Attributes:
        run: grid, layout and options.
        weights, files: size and hash of the checkpoint's weight files, and of its files without weights.
    """

    run: Run
    weights: Mapping[str, FileRecord]
    files: Mapping[str, FileRecord]

    def to_bytes(self, tool_version: str) -> bytes:
        """The file."""
        run = self.run
        told = {
            "shards": RECORD_VERSION,
            "tool_version": tool_version,
            "layout": run.layout,
            "tp": run.grid.tp,
            "ep": run.grid.ep,
            "pp": run.grid.pp,
            "fp8_experts": run.fp8_experts,
            "max_shard_bytes": run.max_shard_bytes,
            "packing": run.packing,
            "source": run.source,
            "run": run.id,
            "weights": _sizes_and_hashes(self.weights),
            "files": _sizes_and_hashes(self.files),
        }
        return (json.dumps(told, indent=2) + "\n").encode()


def _sizes_and_hashes(records: Mapping[str, FileRecord]) -> dict[str, Any]:
    return {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in records.items()}


def read_record(files: Files) -> ShardsRecord:
    """Read v4quant.shards.json of a folder that has one.

    Raises:
        CheckpointError: if it is not such a file, or of another version.
    """
    where = f"{files.where}/{SHARDS_NAME}"
    if files.size(SHARDS_NAME) > MAX_RECORD_BYTES:
        raise CheckpointError(f"{where}: has {files.size(SHARDS_NAME):,} bytes, expected a small file", hint=_HINT)
    try:
        told = strict_json.parse(files.read(SHARDS_NAME))
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}", hint=_HINT) from None
    if isinstance(told, dict) and "rank" in told:
        raise CheckpointError(
            f"{files.where}: is the folder of one rank, expected the folder that holds all of them",
            hint="Give the folder above it; this one alone is checked by: v4quant verify",
        )
    if not isinstance(told, dict) or told.get("shards") != RECORD_VERSION:
        raise CheckpointError(
            f"{where}: is no record of version {RECORD_VERSION}", hint="Shard again with this version of v4quant."
        )
    run = _run(told, where)
    weights = _records(told.get("weights"), f"{where}: weights")
    others = _records(told.get("files"), f"{where}: files")
    require_sound_names(where, weights, others)
    return ShardsRecord(run, weights, others)


def _run(told: Mapping[str, Any], where: str) -> Run:
    layout, source, fp8_experts = told.get("layout"), told.get("source"), told.get("fp8_experts")
    if layout not in tuple(Layout):
        raise CheckpointError(f"{where}: layout is none of {', '.join(Layout)}", hint=_HINT)
    if not isinstance(source, str) or not _DIGEST.fullmatch(source):
        raise CheckpointError(f"{where}: source is no hash", hint=_HINT)
    if not isinstance(fp8_experts, bool):
        raise CheckpointError(f"{where}: fp8_experts is neither true nor false", hint=_HINT)
    tp, ep, pp = (_count(told.get(key), f"{where}: {key}", MAX_RANKS) for key in ("tp", "ep", "pp"))
    size = told.get("max_shard_bytes")
    if type(size) is not int or not 0 <= size < 2**63:
        raise CheckpointError(f"{where}: max_shard_bytes is no number of bytes", hint=_HINT)
    grid = Grid(tp, ep, pp)
    if layout == Layout.DEEPSEEK and (ep, pp) != (1, 1):
        raise CheckpointError(f"{where}: layout is {layout}, expected ep and pp to be 1", hint=_HINT)
    if grid.ranks > MAX_RANKS:
        raise CheckpointError(f"{where}: tells of {grid.ranks:,} ranks, expected at most {MAX_RANKS:,}", hint=_HINT)
    packing = told.get("packing")
    if packing not in tuple(Packing):
        raise CheckpointError(f"{where}: packing is none of {', '.join(Packing)}", hint=_HINT)
    run = Run(grid, Layout(layout), source, fp8_experts, size, Packing(packing))
    if told.get("run") != run.id:
        raise CheckpointError(f"{where}: run is not that of the options beside it", hint=_HINT)
    return run


def _count(told: object, where: str, most: int) -> int:
    if type(told) is not int or not 1 <= told <= most:
        raise CheckpointError(f"{where} is no number from 1 to {most:,}", hint=_HINT)
    return told


def _records(told: object, where: str) -> dict[str, FileRecord]:
    if not isinstance(told, dict) or len(told) > MAX_FILES:
        raise CheckpointError(f"{where} is no object of files", hint=_HINT)
    records: dict[str, FileRecord] = {}
    for name, entry in told.items():
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise CheckpointError(f"{where}: {name[:200]!a} has no bytes and sha256", hint=_HINT)
        records[name] = FileRecord(name, size, digest)
    return records


def require_sound_names(where: str, weights: Collection[str], others: Collection[str], hint: str = _HINT) -> None:
    """Refuse names that would write outside of the folder, or one file in the place of another.

    Args:
        where: what names them.
        weights, others: names of weight files, and of files without weights.

    Raises:
        CheckpointError: for the first such name, or if what makes a checkpoint is not among them.
    """
    files = {*weights, *others}
    for name in weights:
        if not _COMPONENT.fullmatch(name) or not name.endswith(".safetensors"):
            raise CheckpointError(f"{where}: {name[:200]!a} is no name of a weight file", hint=hint)
    for name in others:
        components = name.split("/")
        if not all(map(_COMPONENT.fullmatch, components)) or name == SHARDS_NAME or name.startswith(JOURNAL_NAME):
            raise CheckpointError(f"{where}: {name[:200]!a} is no name of a file in a checkpoint", hint=hint)
        folders = accumulate(components[:-1], lambda folder, part: f"{folder}/{part}")
        if name.endswith((".safetensors", ".partial")) or not files.isdisjoint(folders):
            raise CheckpointError(f"{where}: {name[:200]!a} is no name of a file without weights", hint=hint)
    if not weights or CONFIG_NAME not in others:
        raise CheckpointError(f"{where}: lists no weight files, or no {CONFIG_NAME}", hint=hint)


def in_writing_order(names: Mapping[str, FileRecord]) -> list[str]:
    """Names of files without weights: what makes a folder a checkpoint comes last."""
    last = [name for name in (INDEX_NAME, CONFIG_NAME) if name in names]
    return [*(name for name in names if name not in last), *last]
