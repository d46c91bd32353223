"""The journal of an unfinished run: which of its files are done, so that a killed run continues.

File `v4quant.journal.jsonl` in the output folder: a header line with the plan's digest and the source's fingerprints,
then, for each finished shard, its records (a conversion's are certificate lines) and a closing line. Every shard's
lines are synced after its data, so a shard that the journal calls finished is whole. The file is locked while a run
works, and removed when it is done. One process writes it, however many work on the run (journal_keeper.py).
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from v4quant.checkpoint.certificate import TensorRecord
from v4quant.checkpoint.file_stamp import is_same_fingerprint
from v4quant.checkpoint.output import disk_errors, sync_folder
from v4quant.checkpoint.reader import JOURNAL_NAME
from v4quant.errors import CheckpointError, OutputError


@dataclass(frozen=True)
class JournalHeader:
    """What the unfinished run was: its plan, and what its source files looked like when it began."""

    plan: str
    fingerprints: dict[str, str]

    def is_same_run(self, other: "JournalHeader") -> bool:
        """True if this is a header of the same run: the same plan, and an unchanged source."""
        return self.plan == other.plan and not self.changed_files(other)

    def changed_files(self, other: "JournalHeader") -> list[str]:
        """Names of the source files that are not in both headers as the same unchanged file."""
        names = self.fingerprints.keys() | other.fingerprints.keys()
        pairs = {name: (self.fingerprints.get(name), other.fingerprints.get(name)) for name in names}
        return sorted(n for n, (a, b) in pairs.items() if a is None or b is None or not is_same_fingerprint(a, b))


class Record(Protocol):
    """What is noted of a finished shard."""

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""


class Journal:
    """The open, locked journal of one output folder.

    Attributes:
        finished: names of the shards that are whole.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        """Use `lock_journal`."""
        self.path = path
        self._file = file
        self.finished: set[str] = set()

    def header(self) -> JournalHeader | None:
        """What the unfinished run was; None where the journal is new, or its run was killed before the first line.

        Raises:
            OutputError: if this is no journal.
        """
        with self.path.open(encoding="utf-8", errors="replace") as file:
            line = file.readline()
        if not line.endswith("\n"):
            return None
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            entry: dict[str, Any] = json.loads(line)
            plan, fingerprints = entry["plan"], entry["fingerprints"]
            if isinstance(plan, str) and all(isinstance(mark, str) for mark in fingerprints.values()):
                return JournalHeader(plan, fingerprints)
        raise OutputError(f"{self.path}: not a journal that v4quant writes", hint="Remove it, or the whole folder.")

    def begin(self, header: JournalHeader) -> None:
        """Start an empty journal, durably.

        Raises:
            OutputError: if the disk refuses.
        """
        with disk_errors(self.path):
            self._file.truncate(0)
            self._file.write(json.dumps({"journal": 1, **vars(header)}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            sync_folder(self.path.parent)

    def resume(self, header: JournalHeader) -> None:
        """Continue the run that this journal is of.

        Raises:
            OutputError: if it is of another plan.
            CheckpointError: if the source has changed since that run began.
        """
        found = self.header()
        assert found is not None, "a journal without a header is begun, not resumed"
        _require_same(self.path.parent, found, header)
        self._drop_unfinished_tail()
        self.finished = {shard for shard, _ in _shard_starts(self.path)}

    def append(self, shard: str, records: Sequence[Record]) -> None:
        """Record a finished shard durably; call it after the shard has its final name.

        Raises:
            OutputError: if the disk refuses.
        """
        lines = [json.dumps({"shard": shard, "record": record.to_json()}) for record in records]
        lines.append(json.dumps({"finished": shard}))
        with disk_errors(self.path):
            self._file.write("\n".join(lines) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.finished.add(shard)

    def records(self) -> Iterator[TensorRecord]:
        """Certificate lines of all finished shards, in shard order; one shard in memory at a time."""
        return (TensorRecord.from_json(record, str(self.path)) for record in self.objects())

    def objects(self) -> Iterator[object]:
        """Records of all finished shards as the JSON that they were written as, in shard order."""
        # A shard that was done twice counts as it was done last.
        where = {shard: start for shard, start in _shard_starts(self.path) if shard in self.finished}
        with self.path.open("rb") as file:
            for shard in sorted(where):
                file.seek(where[shard])
                for line in iter(file.readline, b""):
                    entry = _parse_line(self.path, line)
                    if "finished" in entry:
                        break
                    yield entry.get("record")

    def _drop_unfinished_tail(self) -> None:
        """Cut lines that a kill left after the last finished shard, so that what is appended stands on its own."""
        position = end = 0
        with self.path.open("rb") as raw:
            for number, line in enumerate(raw):
                position += len(line)
                if line.endswith(b"\n") and (number == 0 or line.startswith(b'{"finished"')):
                    end = position
        with disk_errors(self.path):
            self._file.truncate(end)

    def close(self) -> None:
        """Release the lock; the file stays for the next run."""
        self._file.close()

    def remove(self) -> None:
        """The conversion is complete: forget it."""
        self.path.unlink(missing_ok=True)
        self._file.close()


def lock_journal(folder: Path) -> Journal:
    """Open a folder's journal, or make an empty one, and lock it for this process.

    Raises:
        OutputError: if another process is writing into this folder, or the disk refuses.
    """
    path = folder / JOURNAL_NAME
    with disk_errors(path):
        # "a+" keeps what is there and appends at the end whatever was read before.
        file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A run that has just ended may have removed the file that was opened here.
        if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
            raise FileNotFoundError
    except OSError as error:
        file.close()
        raise OutputError(
            f"{folder}: another run is writing into this folder",
            hint="Wait for it to end, or choose another folder.",
        ) from error
    return Journal(path, file)


def _require_same(folder: Path, found: JournalHeader, wanted: JournalHeader) -> None:
    if changed := found.changed_files(wanted):
        raise CheckpointError(
            f"{folder} holds an unfinished run, and its source has changed since it began: {', '.join(changed[:5])}",
            hint="Restore the source, or start again with --overwrite.",
        )
    if found.plan != wanted.plan:
        raise OutputError(
            f"{folder} holds an unfinished run with other options (or of another source or version)",
            hint="Repeat the command that began it, choose another folder, or start again with --overwrite.",
        )


def _shard_starts(path: Path) -> Iterator[tuple[str, int]]:
    """Finished shards and the byte where their lines begin."""
    with path.open("rb") as file:
        start = len(file.readline())
        position = start
        for line in file:
            position += len(line)
            if line.startswith(b'{"finished"'):
                yield str(_parse_line(path, line)["finished"]), start
                start = position


def _parse_line(path: Path, line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict):
            return entry
    raise OutputError(f"{path}: not a journal that v4quant writes", hint="Remove it, or the whole folder.")
