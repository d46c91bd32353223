"""Open a folder that `shard` wrote: every rank there, whole, of the same run, and laid out as it must be.

Nothing is believed of the files but what can be checked: from the source headers that the extra file keeps, the layout
is computed again, and every file's size and header must be exactly those.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from v4quant import strict_json
from v4quant.checkpoint.files import Files, Source
from v4quant.checkpoint.header import LENGTH_BYTES, TensorEntry, read_header
from v4quant.checkpoint.layout import Shard
from v4quant.checkpoint.reader import JOURNAL_NAME, MAX_TENSORS, SHARDS_NAME, TENSOR_PARALLEL_FILE
from v4quant.checkpoint.sharding.layout import ShardedLayout, SourceFile, lay_out_ranks
from v4quant.checkpoint.sharding.rank_files import (
    EXTRA_NAME,
    FILE_PREFIX,
    HEADER_PREFIX,
    RANK_KEY,
    RANKS_KEY,
    RUN_KEY,
    Run,
    rank_file,
    rank_folder,
)
from v4quant.checkpoint.sharding.rank_folder import files_beside
from v4quant.checkpoint.sharding.record import ShardsRecord, read_record
from v4quant.checkpoint.sharding.rules import Layout
from v4quant.config import CONFIG_NAME
from v4quant.errors import CheckpointError

_HINT_AGAIN = "Copy the file again from where it was written, or shard the checkpoint again."
_HINT_ONE_RUN = "Put the files of one run of v4quant shard into one folder, under the names that it gave them."


@dataclass(frozen=True)
class ShardedFolder:
    """A sharded checkpoint, as its headers describe it.

    Attributes:
        files: the folder.
        record: v4quant.shards.json.
        layout: where everything lies.
    """

    files: Files
    record: ShardsRecord
    layout: ShardedLayout

    @property
    def where(self) -> str:
        """The folder, as the user named it."""
        return self.files.where


def open_sharded_folder(files: Files) -> ShardedFolder:
    """Read everything about a sharded checkpoint but its data.

    Args:
        files: the folder.

    Raises:
        CheckpointError: if the folder is none that `shard` wrote, or a file is missing, damaged or of another run.
    """
    _require_record(files)
    record = read_record(files)
    if EXTRA_NAME not in files:
        _require_no_others(files, record, {name for name in files.names() if RANK_KEY in mark_of(files, name)})
        raise _missing(files, [EXTRA_NAME], record)
    sources = _source_files(files, record)
    kept = {name: file.bytes for name, file in record.files.items()}
    try:
        layout = lay_out_ranks(sources, kept, record.run)
    except CheckpointError as error:
        raise CheckpointError(f"{files.where}/{EXTRA_NAME}: kept headers: {error}", hint=_HINT_AGAIN) from error
    _require_ranks(files, record, layout)
    for expected in layout.files:
        _require_as_expected(files, expected, layout)
    if layout.run.layout is Layout.RANKS:
        _require_beside(files, record, layout)
    return ShardedFolder(files, record, layout)


def open_sharded(folder: Path) -> ShardedFolder:
    """The same of a local folder."""
    return open_sharded_folder(Files(folder))


def _require_record(files: Files) -> None:
    if SHARDS_NAME in files:
        return
    if JOURNAL_NAME in files:
        raise CheckpointError(
            f"{files.where}: is an unfinished run, expected a whole sharded checkpoint",
            hint="Run the v4quant command that began it again; it continues where it stopped.",
        )
    raise CheckpointError(
        f"{files.where}: has no {SHARDS_NAME}, expected a folder that v4quant shard wrote",
        hint="Tensor-parallel files of other tools lack FP8 scales and more; there is no exact way back from them.",
    )


def _require_ranks(files: Files, record: ShardsRecord, layout: ShardedLayout) -> None:
    """Every file must be there, and nothing that takes itself for one of them besides."""
    _require_no_others(files, record, {file.name for file in layout.files})
    if missing := [file.name for file in layout.files if file.name not in files]:
        raise _missing(files, missing, record)


def _require_no_others(files: Files, record: ShardsRecord, expected: set[str]) -> None:
    """Refuse files that say that they are part of a sharded checkpoint, and are not expected."""
    last = record.run.grid.ranks - 1
    if record.run.layout is Layout.DEEPSEEK:
        ours = f"{rank_file(0, last + 1)} to {rank_file(last, last + 1)}"
    else:
        ours = f"{rank_folder(0)} to {rank_folder(last)}"
    for name in files.names():
        if name in expected or not name.endswith(".safetensors") or not _may_be_ours(name):
            continue
        mark = mark_of(files, name)
        if RUN_KEY in mark:
            rank = f"rank {mark[RANK_KEY]} of {mark.get(RANKS_KEY, '?')}" if RANK_KEY in mark else "the extra file"
            raise CheckpointError(
                f"{files.where}/{name}: holds {rank}, expected {ours} and {EXTRA_NAME} alone: it was renamed, doubled, "
                "or is of another run",
                hint=_HINT_ONE_RUN,
            )
        if TENSOR_PARALLEL_FILE.fullmatch(name):
            raise CheckpointError(
                f"{files.where}/{name}: is none of {ours}, which {SHARDS_NAME} tells of", hint=_HINT_ONE_RUN
            )


def _may_be_ours(name: str) -> bool:
    """True for files of the folder itself, and of folders in it: whatever a rank's folder was renamed to."""
    return name.count("/") <= 1


def _missing(files: Files, missing: list[str], record: ShardsRecord) -> CheckpointError:
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    what = "rank files" if record.run.layout is Layout.DEEPSEEK else "folders of ranks"
    return CheckpointError(
        f"{files.where}/{missing[0]}{more}: is missing, expected {record.run.grid.ranks} {what} and {EXTRA_NAME}",
        hint=_HINT_AGAIN,
    )


def _require_beside(files: Files, record: ShardsRecord, layout: ShardedLayout) -> None:
    """Check what lies in ranks' folders beside the weights."""
    config = files.read(EXTRA_NAME, *_range_of_config(layout))
    expected = files_beside(layout)
    expected |= {f"{name.partition('/')[0]}/{CONFIG_NAME}": config for name in expected}
    if missing := [name for name in expected if name not in files]:
        raise _missing(files, missing, record)
    for name, data in expected.items():
        if files.size(name) != len(data) or files.read(name) != data:
            raise CheckpointError(f"{files.where}/{name}: is not the one that v4quant shard wrote", hint=_HINT_AGAIN)


def _range_of_config(layout: ShardedLayout) -> tuple[int, int]:
    entry = layout.extra.entries[FILE_PREFIX + CONFIG_NAME]
    return entry.start, entry.stop


def mark_of(files: Source, name: str) -> Mapping[str, str]:
    """What a file's metadata says, in any state of the file; nothing where it cannot be read."""
    with contextlib.suppress(CheckpointError, ValueError):
        text, _ = _header(files, name)
        metadata = strict_json.parse(text).get("__metadata__", {})
        return {key: str(value)[:80] for key, value in metadata.items()}
    return {}


def _header(files: Source, name: str) -> tuple[bytes, dict[str, TensorEntry]]:
    return read_header(name, files.size(name), lambda start, stop: files.read(name, start, stop))


def _require_as_expected(files: Files, expected: Shard, layout: ShardedLayout) -> None:
    """Check a file's size and header byte for byte, and say what it is where it is another one."""
    name, where = expected.name, f"{files.where}/{expected.name}"
    size = files.size(name)
    if size == expected.file_bytes and files.read(name, 0, len(expected.header)) == expected.header:
        return
    if size < expected.file_bytes and files.read(name, 0, min(size, len(expected.header))) == expected.header[:size]:
        raise CheckpointError(
            f"{where}: is truncated: has {size:,} bytes, expected {expected.file_bytes:,}", hint=_HINT_AGAIN
        )
    try:
        _header(files, name)
    except CheckpointError as error:
        raise CheckpointError(f"{files.where}/{error}", hint=_HINT_AGAIN) from error
    mark = mark_of(files, name)
    _require_same_run(where, mark, layout.run)
    _require_same_rank(where, name, mark, layout)
    raise CheckpointError(f"{where}: its header is not the one that v4quant shard wrote", hint=_HINT_AGAIN)


def _require_same_run(where: str, mark: Mapping[str, str], run: Run) -> None:
    """Check of which run a file is, by its own word."""
    if RUN_KEY not in mark:
        raise CheckpointError(f"{where}: was not written by v4quant shard", hint=_HINT_ONE_RUN)
    ranks = mark.get(RANKS_KEY, "?")
    if ranks != str(run.grid.ranks):
        raise CheckpointError(f"{where}: is of a set of {ranks} ranks, expected {run.grid.ranks}", hint=_HINT_ONE_RUN)
    if mark[RUN_KEY] != run.id:
        raise CheckpointError(
            f"{where}: is of another run (another checkpoint, or other options) than {SHARDS_NAME}", hint=_HINT_ONE_RUN
        )


def _require_same_rank(where: str, name: str, mark: Mapping[str, str], layout: ShardedLayout) -> None:
    """Check of which rank a file is, by its own word."""
    for rank, files in enumerate(layout.ranks):
        if any(file.name == name for file in files) and mark.get(RANK_KEY) != str(rank):
            raise CheckpointError(
                f"{where}: holds rank {mark.get(RANK_KEY, '?')}, expected rank {rank}: it was renamed or doubled",
                hint=_HINT_ONE_RUN,
            )


def _source_files(files: Files, record: ShardsRecord) -> list[SourceFile]:
    """The checkpoint's weight files, from the headers that the extra file keeps."""
    try:
        _, extra = _header(files, EXTRA_NAME)
    except CheckpointError as error:
        raise CheckpointError(f"{files.where}/{error}", hint=_HINT_AGAIN) from error
    _require_same_run(f"{files.where}/{EXTRA_NAME}", mark_of(files, EXTRA_NAME), record.run)
    found, tensors = [], 0
    for name, file in record.weights.items():
        entry = extra.get(HEADER_PREFIX + name)
        if entry is None or not LENGTH_BYTES <= entry.bytes <= file.bytes:
            raise CheckpointError(
                f"{files.where}/{EXTRA_NAME}: has no header of {name}, expected those of {SHARDS_NAME}",
                hint=_HINT_AGAIN,
            )
        header = files.read(EXTRA_NAME, entry.start, entry.stop)
        entries = _entries(files, name, file.bytes, header)
        tensors += len(entries)
        if tensors > MAX_TENSORS:
            raise CheckpointError(
                f"{files.where}/{EXTRA_NAME}: tells of more than {MAX_TENSORS:,} tensors, expected a V4 checkpoint"
            )
        found.append(SourceFile(name, len(header), sorted(entries.values(), key=lambda e: (e.start, e.stop))))
    return found


def _entries(files: Files, name: str, file_bytes: int, header: bytes) -> dict[str, TensorEntry]:
    """Parse a kept header; it must end where the data begins."""
    where = f"{files.where}/{EXTRA_NAME}: kept header of {name}"
    length = int.from_bytes(header[:LENGTH_BYTES], "little")
    if LENGTH_BYTES + length != len(header):
        raise CheckpointError(f"{where} is damaged", hint=_HINT_AGAIN)
    try:
        _, entries = read_header(name, file_bytes, lambda start, stop: header[start:stop])
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}", hint=_HINT_AGAIN) from error
    return entries
