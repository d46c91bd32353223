"""A sharded folder read as the checkpoint that it was made from: every file of it, put together as it is asked for.

So whatever reads checkpoints reads sharded ones: inspect, convert, verify, and shard itself, which so turns any split
into any other. Nothing is written and nothing is held but the bytes that are asked for.
"""

import hashlib
import threading
from bisect import bisect_right
from functools import cached_property
from pathlib import Path

from v4quant.checkpoint.reader import SHARDS_NAME
from v4quant.checkpoint.sharding.folder import ShardedFolder
from v4quant.checkpoint.sharding.layout import Placement
from v4quant.checkpoint.sharding.rank_files import FILE_PREFIX, HEADER_PREFIX
from v4quant.checkpoint.sharding.stream import read_range
from v4quant.errors import UsageError
from v4quant.formats.cast import Scratch


class _OfThread(threading.local):
    """Buffers of a thread."""

    def __init__(self) -> None:
        self.scratch = Scratch()


class WholeFiles:
    """The files of the checkpoint; see files.Source."""

    def __init__(self, folder: ShardedFolder) -> None:
        self.folder = folder
        self._records = dict(sorted({**folder.record.weights, **folder.record.files}.items()))
        self._places = folder.layout.placements
        self._starts = {name: [place.source.start for place in places] for name, places in self._places.items()}
        self._of_thread = _OfThread()

    @property
    def where(self) -> str:
        """The sharded folder, as the user named it."""
        return self.folder.where

    def names(self) -> list[str]:
        """Relative paths of all files, sorted."""
        return list(self._records)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._records[name].bytes

    def fingerprint(self, name: str) -> str:
        """Of all files of the sharded folder: each file of the checkpoint may be in any of them."""
        return f"{self.size(name)} {self._fingerprint}"

    @cached_property
    def _fingerprint(self) -> str:
        files = self.folder.files
        names = [SHARDS_NAME, *(file.name for file in self.folder.layout.files)]
        return hashlib.sha256("\0".join(files.fingerprint(name) for name in names).encode()).hexdigest()

    def noted_sha256(self, name: str) -> str | None:
        """The hash that was noted when the checkpoint was sharded."""
        return self._records[name].sha256

    def path(self, name: str) -> Path:
        """There is none.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.where}: holds {name} in ranks, expected a checkpoint in whole files",
            hint=f"Make one of them first: v4quant merge {self.where} OUT",
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes [start, stop) of a file, all of it by default.

        Raises:
            CheckpointError: if a file has changed since it was listed, or cannot be read.
        """
        buffer = bytearray((self.size(name) if stop is None else stop) - start)
        self.read_into(name, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on.

        Raises:
            CheckpointError: if a file has changed since it was listed, or cannot be read.
        """
        files, extra = self.folder.files, self.folder.layout.extra
        if name not in self._places:
            entry = extra.entries[FILE_PREFIX + name]
            files.read_into(entry.file, entry.start + start, buffer)
            return
        header, done = extra.entries[HEADER_PREFIX + name], 0
        if start < header.bytes:
            done = min(len(buffer), header.bytes - start)
            files.read_into(header.file, header.start + start, buffer[:done])
        places, first = self._places[name], max(bisect_right(self._starts[name], start + done) - 1, 0)
        for place in places[first:]:
            if done == len(buffer):
                break
            done += self._read_tensor(place, start + done - place.source.start, buffer[done:])

    def _read_tensor(self, place: Placement, start: int, buffer: memoryview) -> int:
        """Fill a buffer from byte `start` of a tensor on, as far as it goes; returns how many bytes that were."""
        count = min(len(buffer), place.source.bytes - start)
        if count > 0:
            read_range(self.folder.files, place, start, buffer[:count], self._of_thread.scratch)
        return max(count, 0)

    def require_unchanged(self, name: str) -> None:
        """Check that the files of the sharded folder are still those that were listed.

        Raises:
            CheckpointError: if one is not.
        """
        del name
        for file in self.folder.layout.files:
            self.folder.files.require_unchanged(file.name)
