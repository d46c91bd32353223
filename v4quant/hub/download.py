"""A repository, or part of it, into a folder: every file re-hashed, a corrupt one fetched again.

Weights come first, index and config last, so that an unfinished folder is not taken for a checkpoint. Nothing outside
the folder is written, whatever names and links say. What a killed run has fetched is kept (fetch.py).
"""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.output import disk_errors, require_disk_space
from v4quant.checkpoint.run_folder import STATE_FOLDER
from v4quant.config import CONFIG_NAME
from v4quant.errors import CheckpointError, HubError, InterruptedRunError, OutputError
from v4quant.hub.client import connect
from v4quant.hub.fetch import Advance, Fetcher
from v4quant.hub.listing import RemoteFile
from v4quant.hub.location import Location
from v4quant.hub.origin import Origin, downloaded_from, note_download
from v4quant.hub.remote_files import RemoteFiles, open_remote
from v4quant.hub.select import Selection, select

_LAST = (INDEX_NAME, CONFIG_NAME)
_READ_BYTES = 4 * 2**20
_SHOWN = 10


@dataclass
class DownloadReport:
    """What a download did.

    Attributes:
        origin: repository and commit.
        names: the files that are there now, each with the hash that the Hub lists.
        bytes: of them all.
        fetched: files that came over the network, in this run.
        repaired: those among them that were there before, with another hash.
    """

    origin: Origin
    names: list[str] = field(default_factory=list)
    bytes: int = 0
    fetched: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)


def download(
    location: Location,
    folder: Path,
    selection: Selection,
    *,
    workers: int,
    overwrite: bool,
    progress: Callable[[int], Advance],
) -> DownloadReport:
    """Make a folder hold the wanted files of a repository as they are at one commit.

    Args:
        workers: files at a time.
        overwrite: replace files of another origin that are in the way.
        progress: told how many bytes there are in all; gives what is told bytes that are there and right.

    Raises:
        HubError: if files cannot be had; those that can be are there.
        CheckpointError: if a file arrives damaged again and again, or names in the repository are not safe.
        UsageError: if no file is wanted.
        OutputError: if the disk is too small or refuses, or something is in the way.
        InterruptedRunError: at Ctrl-C; what is there is kept.
    """
    hub = connect()
    files = open_remote(location, hub)
    origin = Origin(location.repo_id, location.revision, files.listing.commit)
    wanted = [files.file(name) for name in select(files, selection)]
    with _state_folder(folder) as state:
        stop, known = threading.Event(), downloaded_from(folder)
        total = sum(file.size for file in wanted)
        fetcher = Fetcher(hub, files.listing, files.ranges, state, _ignore, stop)
        job = _Job(folder, files, fetcher, stop, DownloadReport(origin))
        job.require_room(wanted)
        if not overwrite and (known is None or known.repo_id != origin.repo_id):
            job.require_no_strangers(wanted)
        note_download(folder, origin)
        fetcher.report_to(progress(total))
        job.run([file for file in wanted if file.name not in _LAST], workers)
        job.run([file for file in wanted if file.name in _LAST], 1)
        job.raise_failures(len(wanted))
    return job.report


@dataclass
class _Job:
    """The files of one download."""

    folder: Path
    files: RemoteFiles
    fetcher: Fetcher
    stop: threading.Event
    report: DownloadReport
    failures: list[tuple[str, HubError | CheckpointError]] = field(default_factory=list)

    def require_room(self, wanted: list[RemoteFile]) -> None:
        """Refuse a download that the disk cannot hold, before anything is fetched."""
        missing = 0
        for file in wanted:
            path = self._target(file)
            if not (path.is_file() and path.stat().st_size == file.size):
                missing += file.size - self.fetcher.bytes_there(file)
        require_disk_space(self.folder, missing)

    def require_no_strangers(self, wanted: list[RemoteFile]) -> None:
        """Refuse to replace files that no download of this repository put here."""
        for file in wanted:
            path = self._target(file)
            if path.exists() and not self._is_right(file, path):
                raise OutputError(
                    f"{path}: is not the file of {self.report.origin}, and no download of it began here",
                    hint="Choose another folder, or replace it with --overwrite.",
                )

    def run(self, wanted: list[RemoteFile], workers: int) -> None:
        """Check or fetch files, several at a time; the failures of single files are collected."""
        with ThreadPoolExecutor(workers) as pool:
            tasks = [pool.submit(self._bring, file) for file in wanted]
            try:
                for file, task in zip(wanted, tasks, strict=True):
                    try:
                        task.result()
                    except (HubError, CheckpointError) as error:
                        self.failures.append((file.name, error))
            except BaseException as error:
                self.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                if isinstance(error, KeyboardInterrupt):
                    raise InterruptedRunError(
                        f"interrupted: {len(self.report.names)} files are there and checked",
                        hint="Run the same command again to continue.",
                    ) from None
                raise

    def raise_failures(self, of: int) -> None:
        """Say which files are not there and why.

        Raises:
            HubError, CheckpointError: if there are such files.
        """
        if not self.failures:
            return
        lines = [f"  {name}: {error}" for name, error in self.failures[:_SHOWN]]
        if len(self.failures) > _SHOWN:
            lines.append(f"  ... and {len(self.failures) - _SHOWN} more")
        worst = next((e for _, e in self.failures if isinstance(e, CheckpointError)), self.failures[0][1])
        raise type(worst)(
            f"{len(self.failures)} of {of} files of {self.report.origin} are not there:\n" + "\n".join(lines),
            hint=worst.hint or "Run the same command again; what is done is kept.",
        )

    def _bring(self, file: RemoteFile) -> None:
        path = self._target(file)
        was_there = path.exists()
        if not (was_there and self._is_right(file, path)):
            require_disk_space(self.folder, file.size - self.fetcher.bytes_there(file))
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            self.fetcher.fetch(file, path)
            self.report.fetched.append(file.name)
            if was_there:
                self.report.repaired.append(file.name)
        self.report.names.append(file.name)
        self.report.bytes += file.size

    def _target(self, file: RemoteFile) -> Path:
        """Where a file goes.

        Raises:
            OutputError: if a link on the way would lead out of the folder, or a folder is in the way.
        """
        path = self.folder
        *above, _ = parts = file.name.split("/")
        for depth, part in enumerate(parts):
            path = path / part
            if path.is_symlink():
                raise OutputError(f"{path}: is a link, expected a file or folder", hint="Remove it.")
            if path.exists() and path.is_dir() is not (depth < len(above)):
                raise OutputError(f"{path}: is in the way of {file.name}", hint="Remove it, or choose another folder.")
        return path

    def _is_right(self, file: RemoteFile, path: Path) -> bool:
        """True if a file has the hash that the Hub lists; all of it is read."""
        with disk_errors(path):
            if path.stat().st_size != file.size:
                return False
            hasher = file.hasher()
            with path.open("rb") as content:
                while chunk := content.read(_READ_BYTES):
                    hasher.update(chunk)
                    self.fetcher.step(len(chunk), file)
        if hasher.hexdigest() == file.digest:
            return True
        self.fetcher.step(-file.size, file)
        return False


@contextmanager
def _state_folder(folder: Path) -> Iterator[Path]:
    """The hidden folder with the unfinished files, locked for this process; only the note stays in it at the end.

    Raises:
        OutputError: if another run works in this folder, or the disk refuses.
    """
    state = folder / STATE_FOLDER
    with disk_errors(state):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder}: is a file, expected a folder or nothing", hint="Choose another folder.")
        if state.is_symlink():
            raise OutputError(f"{state}: is a link, expected a folder", hint="Remove it.")
        state.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"{folder}: another download is writing into this folder") from error
        yield state
        with disk_errors(state):
            for left_over in state.glob("*.partial"):
                left_over.unlink()
    finally:
        os.close(descriptor)


def _ignore(_count: int, _file: str) -> None:
    """Report progress to nobody."""
