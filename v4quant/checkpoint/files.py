"""The files of a checkpoint folder: listed once, read by byte range, and watched for changes while we read.

The folder is hostile input: nothing outside it is opened, whatever links and indexes say. One layout of links is
trusted because every Hub download has it: `snapshots/REVISION/FILE -> ../../blobs/HASH` in the Hub's cache.
"""

import contextlib
import os
import stat
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from v4quant.checkpoint.file_stamp import Stamp
from v4quant.errors import CheckpointError

if TYPE_CHECKING:
    from v4quant.checkpoint.direct import DirectFile

MAX_FILES = 100_000
MAX_FOLDERS_DEEP = 32
_OPEN_FILES_A_THREAD = 8
# Reads of this size go past the page cache (direct.py); smaller ones are headers, scales and other small things.
DIRECT_READ_BYTES = 2**17
_HINT_CHANGED = "Leave the source alone while it is read; then run the same command again."


class Source(Protocol):
    """The files of a checkpoint, wherever they are; read by byte range, from any thread."""

    @property
    def where(self) -> str:
        """What the user calls it."""

    def names(self) -> list[str]:
        """Relative paths of all files, sorted."""

    def __contains__(self, name: str) -> bool:
        """Whether there is such a file."""

    def size(self, name: str) -> int:
        """Bytes of a file, as it was listed."""

    def fingerprint(self, name: str) -> str:
        """What tells a file from a changed one without reading it; file_stamp.is_same_fingerprint compares two."""

    def noted_sha256(self, name: str) -> str | None:
        """The hash that is promised of a file; None where nobody promised any."""

    def path(self, name: str) -> Path:
        """Absolute path of a file.

        Raises:
            UsageError: if it is none on this disk.
        """

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes [start, stop) of a file, all of it by default.

        Raises:
            CheckpointError: if the file has changed since it was listed, or cannot be read.
        """

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on.

        Raises:
            CheckpointError: if the file has changed since it was listed, or cannot be read.
        """

    def require_unchanged(self, name: str) -> None:
        """Check that the file is still the one that was listed.

        Raises:
            CheckpointError: if it is not.
        """


class Files:
    """The regular files of one local folder, by relative path with "/".

    Hidden files and folders (.git, .cache) are no part of a checkpoint and not listed.

    Attributes:
        where: the folder, as the user named it.
    """

    def __init__(self, folder: Path) -> None:
        """List the folder.

        Raises:
            CheckpointError: if there is no such folder, it cannot be read, or a link in it leads out of it.
        """
        self.where = str(folder)
        with _read_errors(self.where):
            _require_folder(folder)
            self._root = folder.resolve()
            self._stat = dict(sorted(self._walk(self._root, "")))
        self._handles = _Handles()

    def names(self) -> list[str]:
        """Relative paths of all files, sorted."""
        return list(self._stat)

    def __contains__(self, name: str) -> bool:
        return name in self._stat

    def size(self, name: str) -> int:
        """Bytes of a file, as it was listed."""
        return self._stat[name].st_size

    def fingerprint(self, name: str) -> str:
        """What tells a file from a changed one without reading it; file_stamp.is_same_fingerprint compares two.

        The numbers of a Stamp.
        """
        return " ".join(map(str, Stamp.of(self._stat[name])))

    def is_at(self, name: str, path: Path) -> bool:
        """True if a path is another name of a listed file: a hard link to it."""
        try:
            found = path.lstat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (self._stat[name].st_dev, self._stat[name].st_ino)

    def device(self, name: str) -> int:
        """Number of the file system that a file lies on."""
        return self._stat[name].st_dev

    def noted_sha256(self, name: str) -> str | None:
        """Nothing: a folder promises no hashes."""
        del name
        return None

    def path(self, name: str) -> Path:
        """Absolute path of a listed file."""
        return self._root / name

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes [start, stop) of a file, all of it by default.

        Raises:
            CheckpointError: if the file has changed since it was listed, or cannot be read.
        """
        buffer = bytearray((self.size(name) if stop is None else stop) - start)
        self.read_into(name, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on; safe from any thread.

        Raises:
            CheckpointError: if the file has changed since it was listed, or cannot be read.
        """
        where = f"{self.where}/{name}"
        with _read_errors(where):
            handle = self._handles.open(str(self.path(name)))
            self._require_unchanged(where, name, os.fstat(handle.descriptor))
            if handle.read_into(start, buffer) < len(buffer):
                raise CheckpointError(f"{where}: is shorter than its {self.size(name):,} bytes", hint=_HINT_CHANGED)

    def require_unchanged(self, name: str) -> None:
        """Check that the file at this path is still the one that was listed.

        Raises:
            CheckpointError: if it is not.
        """
        where = f"{self.where}/{name}"
        with _read_errors(where):
            self._require_unchanged(where, name, self.path(name).stat())

    def _require_unchanged(self, where: str, name: str, found: os.stat_result) -> None:
        listed = self._stat[name]
        if found.st_ino != listed.st_ino or not Stamp.of(found).is_same(Stamp.of(listed)):
            raise CheckpointError(f"{where}: has changed since this run began", hint=_HINT_CHANGED)

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
        if prefix.count("/") > MAX_FOLDERS_DEEP:
            raise CheckpointError(f"{self.where}: holds folders in folders, more than {MAX_FOLDERS_DEEP} deep")
        with _read_errors(str(folder)), os.scandir(folder) as entries:
            listed = [entry for entry in entries if not entry.name.startswith(".")]
        if len(listed) > MAX_FILES:
            raise CheckpointError(f"{folder}: holds {len(listed):,} files, expected at most {MAX_FILES:,}")
        for entry in listed:
            _require_plain_name(entry)
            if entry.is_symlink():
                self._require_inside(entry)
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/")
                continue
            with _read_errors(entry.path):
                found = entry.stat()
            if stat.S_ISREG(found.st_mode):
                yield prefix + entry.name, found

    def _require_inside(self, entry: os.DirEntry[str]) -> None:
        target = Path(os.path.realpath(entry.path))  # Path.resolve() has an error of its own for links in a circle
        blobs = self._root.parent.parent / "blobs"
        is_hub_cache = self._root.parent.name == "snapshots" and target.parent == blobs
        if not (is_hub_cache or target.is_relative_to(self._root)):
            raise CheckpointError(
                f"{entry.path}: is a link out of the checkpoint folder, to {target}",
                hint="Replace the link by the file it stands for, or remove it.",
            )


def _require_plain_name(entry: os.DirEntry[str]) -> None:
    """Refuse names that would steer a terminal, forge a line of output, or are no text at all."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in entry.name):
        raise CheckpointError(
            f"{entry.path!a}: has a name with control characters or not in UTF-8", hint="Rename or remove it."
        )


def _require_folder(folder: Path) -> None:
    if not folder.exists():
        raise CheckpointError(
            f"{folder}: no such folder, expected a checkpoint",
            hint="Check the path. A repository on the Hub is REPO_ID (owner/name) or hf://REPO_ID@REVISION.",
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is a file, expected the folder that holds config.json and *.safetensors",
            hint=f"Give its folder: {folder.parent}",
        )


@contextlib.contextmanager
def _read_errors(where: str) -> Iterator[None]:
    """Turn what the operating system says while reading into one clear error.

    Raises:
        CheckpointError: for every OSError.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{where}: cannot read: {error.strerror or error}", hint="Check the disk and the file's permissions."
        ) from error


class _Handle:
    """An open file; closes itself when it is let go of."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._direct: DirectFile | None = None
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, start: int, buffer: memoryview) -> int:
        """Fill a buffer from byte `start` on; returns less than its size at the end of the file only."""
        if len(buffer) >= DIRECT_READ_BYTES:
            # Headers are read without numpy, which takes longer to import than `inspect` to run.
            import numpy as np

            from v4quant.checkpoint.direct import DirectFile

            self._direct = self._direct or DirectFile(self._path, self.descriptor, os.O_RDONLY)
            return self._direct.read_into(start, np.frombuffer(buffer, np.uint8))
        done = 0
        while done < len(buffer) and (count := os.preadv(self.descriptor, [buffer[done:]], start + done)):
            done += count
        return done

    def __del__(self) -> None:
        if self._direct is not None:
            self._direct.close()
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Handles(threading.local):
    """Open files of one thread, those used last: its own, so that the kernel sees each thread read straight ahead."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, _Handle] = OrderedDict()

    def open(self, path: str) -> _Handle:
        """The open file of a path."""
        if path not in self._open:
            self._open[path] = _Handle(path)
            if len(self._open) > _OPEN_FILES_A_THREAD:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]
