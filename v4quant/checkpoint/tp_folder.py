"""Open a folder that `shard` wrote: every rank there, whole, of the same run, and laid out as it must be.

Nothing is believed of the files but what can be checked: from the source headers that the extra file keeps, the layout
is computed again, and every file's size and header must be exactly those.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from v4quant import strict_json
from v4quant.checkpoint.files import Files
from v4quant.checkpoint.header import LENGTH_BYTES, TensorEntry, read_header
from v4quant.checkpoint.layout import Shard
from v4quant.checkpoint.reader import JOURNAL_NAME, SHARDS_NAME, TENSOR_PARALLEL_FILE
from v4quant.checkpoint.tp_layout import (
    EXTRA_NAME,
    HEADER_PREFIX,
    RANK_KEY,
    RANKS_KEY,
    RUN_KEY,
    SourceFile,
    TpLayout,
    lay_out_ranks,
    rank_file,
)
from v4quant.checkpoint.tp_record import ShardsRecord, read_record
from v4quant.errors import CheckpointError

_HINT_AGAIN = "Copy the file again from where it was written, or shard the checkpoint again."
_HINT_ONE_RUN = "Put the files of one run of v4quant shard into one folder, under the names that it gave them."


@dataclass(frozen=True)
class TpFolder:
    """A folder of tensor-parallel files, as its headers describe it.

    Attributes:
        files: the folder.
        record: v4quant.shards.json.
        layout: where everything lies.
    """

    files: Files
    record: ShardsRecord
    layout: TpLayout

    @property
    def where(self) -> str:
        """The folder, as the user named it."""
        return self.files.where


def open_tp_folder(folder: Path) -> TpFolder:
    """Read everything about a sharded checkpoint but its data.

    Raises:
        CheckpointError: if the folder is none that `shard` wrote, or a file is missing, damaged or of another run.
    """
    files = Files(folder)
    _require_record(files)
    record = read_record(files)
    _require_ranks(files, record)
    sources = _source_files(files, record)
    kept = {name: file.bytes for name, file in record.files.items()}
    try:
        layout = lay_out_ranks(sources, kept, record.ranks, fp8_experts=record.fp8_experts, run=record.run)
    except CheckpointError as error:
        raise CheckpointError(f"{files.where}/{EXTRA_NAME}: kept headers: {error}", hint=_HINT_AGAIN) from error
    for expected in layout.files:
        _require_as_expected(files, expected, record)
    return TpFolder(files, record, layout)


def _require_record(files: Files) -> None:
    if SHARDS_NAME in files:
        return
    if JOURNAL_NAME in files:
        raise CheckpointError(
            f"{files.where}: is an unfinished run, expected a whole set of tensor-parallel files",
            hint="Run the v4quant command that began it again; it continues where it stopped.",
        )
    raise CheckpointError(
        f"{files.where}: has no {SHARDS_NAME}, expected a folder that v4quant shard wrote",
        hint="Tensor-parallel files of other tools lack FP8 scales and more; there is no exact way back from them.",
    )


def _require_ranks(files: Files, record: ShardsRecord) -> None:
    """Every rank must be there once, and nothing that takes itself for one besides."""
    expected = [*(rank_file(rank, record.ranks) for rank in range(record.ranks)), EXTRA_NAME]
    top = [name for name in files.names() if "/" not in name and name.endswith(".safetensors")]
    for name in top:
        if name in expected:
            continue
        mark = _mark(files, name)
        if RUN_KEY in mark:
            rank = f"rank {mark[RANK_KEY]} of {mark.get(RANKS_KEY, '?')}" if RANK_KEY in mark else "the extra file"
            raise CheckpointError(
                f"{files.where}/{name}: holds {rank}, expected {expected[0]} to {expected[-2]} and {EXTRA_NAME} alone: "
                "it was renamed, doubled, or is of another run",
                hint=_HINT_ONE_RUN,
            )
        if TENSOR_PARALLEL_FILE.fullmatch(name):
            raise CheckpointError(
                f"{files.where}/{name}: is none of {expected[0]} to {expected[-2]}, which {SHARDS_NAME} tells of",
                hint=_HINT_ONE_RUN,
            )
    missing = [name for name in expected if name not in top]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{files.where}/{missing[0]}{more}: is missing, expected {record.ranks} rank files and {EXTRA_NAME}",
            hint=_HINT_AGAIN,
        )


def _mark(files: Files, name: str) -> Mapping[str, str]:
    """What a file's metadata says, in any state of the file; nothing where it cannot be read."""
    with contextlib.suppress(CheckpointError, ValueError):
        text, _ = _header(files, name)
        metadata = strict_json.parse(text).get("__metadata__", {})
        return {key: str(value)[:80] for key, value in metadata.items()}
    return {}


def _header(files: Files, name: str) -> tuple[bytes, dict[str, TensorEntry]]:
    return read_header(name, files.size(name), lambda start, stop: files.read(name, start, stop))


def _require_as_expected(files: Files, expected: Shard, record: ShardsRecord) -> None:
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
    _require_same_run(where, name, _mark(files, name), record)
    raise CheckpointError(f"{where}: its header is not the one that v4quant shard wrote", hint=_HINT_AGAIN)


def _require_same_run(where: str, name: str, mark: Mapping[str, str], record: ShardsRecord) -> None:
    """Check whose file it is by its own word."""
    if RUN_KEY not in mark:
        raise CheckpointError(f"{where}: was not written by v4quant shard", hint=_HINT_ONE_RUN)
    ranks = mark.get(RANKS_KEY, "?")
    if ranks != str(record.ranks):
        raise CheckpointError(f"{where}: is of a set of {ranks} ranks, expected {record.ranks}", hint=_HINT_ONE_RUN)
    if mark[RUN_KEY] != record.run:
        raise CheckpointError(
            f"{where}: is of another run (another checkpoint, or other options) than {SHARDS_NAME}", hint=_HINT_ONE_RUN
        )
    for rank in range(record.ranks):
        if name == rank_file(rank, record.ranks) and mark.get(RANK_KEY) != str(rank):
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
    _require_same_run(f"{files.where}/{EXTRA_NAME}", EXTRA_NAME, _mark(files, EXTRA_NAME), record)
    found = []
    for name, file in record.weights.items():
        entry = extra.get(HEADER_PREFIX + name)
        if entry is None or not LENGTH_BYTES <= entry.bytes <= file.bytes:
            raise CheckpointError(
                f"{files.where}/{EXTRA_NAME}: has no header of {name}, expected those of {SHARDS_NAME}",
                hint=_HINT_AGAIN,
            )
        header = files.read(EXTRA_NAME, entry.start, entry.stop)
        entries = _entries(files, name, file.bytes, header)
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
