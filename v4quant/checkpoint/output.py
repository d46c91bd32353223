"""Writing an output folder so that nothing half-written ever looks whole.

A file is written under its name + ".partial", synced, and renamed; the folder is synced after each rename. What makes a
folder a checkpoint (config and index) is written last, and removed first.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from v4quant.checkpoint.direct import DirectFile
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.reader import SHARDS_NAME, SOURCE_NAME
from v4quant.config import CONFIG_NAME, INFERENCE_CONFIG_NAME
from v4quant.errors import OutputError

PARTIAL_SUFFIX = ".partial"
RANK_FOLDERS = "rank-[0-9]*"  # of a sharded checkpoint, see sharding/rank_files.py


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says while writing into one clear error.

    Raises:
        OutputError: for every OSError: disk full, quota, read-only, not permitted.
    """
    try:
        yield
    except OSError as error:
        remedy = "Free space or choose another folder"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "Allow more open files (ulimit -n)"
        raise OutputError(
            f"{path}: cannot write: {error.strerror or error}",
            hint=f"{remedy}, then run the command again; finished shards are kept.",
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames in this folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file whole or not at all, durably.

    Raises:
        OutputError: if the disk refuses.
    """
    with StreamedFile(path) as file:
        for chunk in chunks:
            file.write(chunk)
        file.finish()


class StreamedFile:
    """A file written from front to back, whole or not at all; a context manager that removes what was not finished."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.unlink(missing_ok=True)  # as of a ShardFile
            self._file = self._partial.open("xb")

    def __enter__(self) -> "StreamedFile":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):  # what could not be written, an error on its way says
                self._file.close()
            self._partial.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Add bytes.

        Raises:
            OutputError: if the disk refuses.
        """
        with disk_errors(self._path):
            self._file.write(data)

    def finish(self) -> None:
        """Sync, close and give the file its name.

        Raises:
            OutputError: if the disk refuses.
        """
        with disk_errors(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._partial.replace(self._path)
            self._file.close()
            sync_folder(self._path.parent)


class ShardFile:
    """An output shard being written at known offsets, from any thread; whole only after `finish`."""

    def __init__(
        self, path: Path, header: bytes, file_bytes: int, partial: Path | None = None, *, again: bool = False
    ) -> None:
        """Create the partial file at its final size, so that a full disk is known at once, and write its header.

        Args:
            path: the file's real name.
            header: its first bytes.
            file_bytes: its size.
            partial: the partial file; beside the real one by default, with PARTIAL_SUFFIX.
            again: go on with the partial file of an earlier run, which has its size and header.

        Raises:
            OutputError: if the disk refuses.
        """
        self.path = path
        self._partial = partial or path.with_name(path.name + PARTIAL_SUFFIX)
        with disk_errors(path):
            if not again:  # what a killed run left may be another name of a source file, which must not be written to
                self._partial.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if again else os.O_CREAT | os.O_EXCL)
            self._descriptor = os.open(self._partial, flags, 0o644)
            self._direct = DirectFile(str(self._partial), self._descriptor, os.O_WRONLY)
        if again:
            return
        try:
            with disk_errors(path):
                os.posix_fallocate(self._descriptor, 0, file_bytes)
            self.write(header, 0)
        except BaseException:  # an interrupt too: the file is no one's yet
            self.abandon()
            raise

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes at an absolute offset.

        Raises:
            OutputError: if the disk refuses.
        """
        with disk_errors(self.path):
            self._direct.write(np.frombuffer(data, np.uint8), offset)

    def finish(self) -> None:
        """Sync, close and give the file its real name.

        Raises:
            OutputError: if the disk refuses.
        """
        with disk_errors(self.path):
            self._direct.close()
            os.fsync(self._descriptor)
            self._close()
            self._partial.replace(self.path)
            sync_folder(self.path.parent)

    def sync(self) -> None:
        """Make durable what was written so far.

        Raises:
            OutputError: if the disk refuses.
        """
        with disk_errors(self.path):
            os.fsync(self._descriptor)

    def leave(self) -> None:
        """Close the partial file and keep it, for a run that goes on with it."""
        self._direct.close()
        self._close()

    def abandon(self) -> None:
        """Close and remove the partial file."""
        self.leave()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        """Close the descriptor once: its number may be another file's a moment later."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # what could not be written, the sync before has said
                os.close(descriptor)


def require_free(out: Path, *, overwrite: bool, keep: str = "") -> None:
    """Check that a checkpoint may be written into a folder.

    Args:
        keep: name of a file that does not count.

    Raises:
        OutputError: if out is no folder, or holds something and overwrite is False.
    """
    with disk_errors(out):
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: is a file, expected a folder or nothing", hint="Choose another output folder.")
        if not overwrite and out.is_dir() and any(path.name != keep for path in out.iterdir()):
            raise OutputError(
                f"{out}: is not empty, expected an empty folder or none",
                hint="Choose another folder, or replace the checkpoint in it with --overwrite.",
            )


def make_room(out: Path, needed_bytes: int, keep: str = "") -> None:
    """Make the folder, and remove what would contradict a new checkpoint in it; the user's other files stay.

    Args:
        needed_bytes: what the new checkpoint will take.
        keep: name of a file to leave all the same.

    Raises:
        OutputError: if the disk is too small, in which case nothing was removed, or refuses.
    """
    with disk_errors(out):
        links = [path for path in out.rglob("*") if path.is_symlink() and path.is_dir()] if out.is_dir() else []
        if links:
            raise OutputError(
                f"{links[0]}: is a link to a folder; what is written or removed there would be another folder's",
                hint="Remove the link, or choose another output folder.",
            )
        # inference/config.json says how experts are stored, so an old one would lie about the new.
        names = (CONFIG_NAME, INDEX_NAME, INFERENCE_CONFIG_NAME, SHARDS_NAME, SOURCE_NAME)
        ranks = sorted(path for path in out.glob(RANK_FOLDERS) if path.is_dir())
        old = [path for folder in (out, *ranks) for name in names if (path := folder / name).exists()]
        for pattern in ("*.safetensors", f"*{PARTIAL_SUFFIX}", "v4quant.*.jsonl"):
            old += (path for folder in (out, *ranks) for path in folder.glob(pattern) if path.name != keep)
        folders = [path for path in old if path.is_dir() and not path.is_symlink()]
        if folders:
            raise OutputError(
                f"{folders[0]}: is a folder, expected a file of a checkpoint", hint="Choose another output folder."
            )
        # What has another name elsewhere takes its space there.
        freed = sum(found.st_size for path in old if (found := path.lstat()).st_nlink == 1)
        require_disk_space(out, needed_bytes - freed)
        for path in old:
            path.unlink()
        for folder in ranks:
            with contextlib.suppress(OSError):  # the user has other files there
                folder.rmdir()
        out.mkdir(parents=True, exist_ok=True)


def require_disk_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a job that the disk cannot hold, before anything is written.

    Raises:
        OutputError: if less than needed_bytes is free on the folder's disk.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise OutputError(
            f"{folder}: needs {needed_bytes:,} bytes, {free:,} are free: {needed_bytes - free:,} short",
            hint="Free space or choose a folder on another disk; nothing was written.",
        )


def free_bytes(folder: Path) -> int:
    """Bytes free for us on the disk of this folder, or of its nearest existing parent.

    Raises:
        OutputError: if the file system does not answer.
    """
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    with disk_errors(folder):
        return shutil.disk_usage(existing).free
