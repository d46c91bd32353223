"""One file of a repository onto the disk: continued where it stopped, and given its name only when its hash is right.

While it is fetched it lies under a name made of its hash and path, so what a killed run left is found again by the next
run, wherever main has moved to, and is not taken for the rest of another content.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from huggingface_hub.file_download import xet_get
from huggingface_hub.utils._runtime import is_xet_available
from huggingface_hub.utils._xet import XetFileData, XetTokenType, is_valid_xet_hash, xet_connection_info_refresh_url

from v4quant.checkpoint.output import disk_errors, sync_folder
from v4quant.errors import CheckpointError
from v4quant.hub.client import Hub
from v4quant.hub.errors import hub_errors
from v4quant.hub.listing import Listing, RemoteFile
from v4quant.hub.ranges import Ranges

_READ_BYTES = 4 * 2**20
Advance = Callable[[int, str], None]


class StoppedError(Exception):
    """The run is ending; what is there of the file stays for the next one."""


class Fetcher:
    """Fetches files of one commit; safe from any thread."""

    def __init__(
        self, hub: Hub, listing: Listing, ranges: Ranges, partial_folder: Path, advance: Advance, stop: threading.Event
    ) -> None:
        """Fetch files of a commit.

        Args:
            partial_folder: where unfinished files lie; it exists, on the disk that the files will be on.
            advance: told bytes that are there, and of which file; a negative count takes some back.
            stop: set when the run ends early.
        """
        self._hub = hub
        self._listing = listing
        self._ranges = ranges
        self._folder = partial_folder
        self._advance = advance
        self._stop = stop

    def partial(self, file: RemoteFile) -> Path:
        """Where a file lies while it is fetched."""
        return self._folder / f"{file.key}.partial"

    def bytes_there(self, file: RemoteFile) -> int:
        """Bytes of a file that an earlier run has fetched."""
        partial = self.partial(file)
        with disk_errors(partial):
            return min(partial.stat().st_size, file.size) if partial.is_file() else 0

    def fetch(self, file: RemoteFile, target: Path) -> None:
        """Fetch a file and put it in its place, replacing what is there.

        Raises:
            HubError: if the Hub refuses or cannot be reached.
            CheckpointError: if what arrives does not have the hash that the Hub lists, twice.
            OutputError: if the disk refuses.
            StoppedError: if the run is ending.
        """
        partial = self.partial(file)
        found = self._fetch_once(file, partial)
        if found != file.digest:
            # What an earlier run left may be damaged, or the network was: once more from the beginning.
            self._advance(-file.size, file.name)
            with disk_errors(partial):
                partial.unlink(missing_ok=True)
            found = self._fetch_once(file, partial)
        if found != file.digest:
            with disk_errors(partial):
                partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self._listing}: {file.name}: arrives with hash {found[:16]}..., expected {file.digest[:16]}...",
                hint="It is damaged on the Hub or on the way; tell the repository's owner if it stays so.",
            )
        with disk_errors(target):
            partial.replace(target)
            sync_folder(target.parent)

    def _fetch_once(self, file: RemoteFile, partial: Path) -> str:
        """Fetch what is missing; returns the hash of all of it."""
        there = self.bytes_there(file)
        if there == 0 and file.size and self._fetch_by_xet(file, partial):
            there = file.size
        hasher = file.hasher()
        with disk_errors(partial), partial.open("ab") as output:
            output.truncate(there)
            with partial.open("rb") as kept:
                while chunk := kept.read(_READ_BYTES):
                    hasher.update(chunk)
                    self.step(len(chunk), file)

            def take(chunk: bytes) -> None:
                _write(output, chunk, partial)
                hasher.update(chunk)
                self.step(len(chunk), file)

            self._ranges.fetch(file, there, file.size, take)
            output.flush()
            os.fsync(output.fileno())
        return hasher.hexdigest()

    def _fetch_by_xet(self, file: RemoteFile, partial: Path) -> bool:
        """Let huggingface_hub fetch a file from Xet storage, where it lies there and Xet is installed.

        Xet fills a file in any order, so until it is whole it has a name of its own, which no run continues.
        """
        if file.xet_hash is None or not is_xet_available() or not is_valid_xet_hash(file.xet_hash):
            return False
        route = xet_connection_info_refresh_url(
            token_type=XetTokenType.READ,
            repo_id=self._listing.repo_id,
            repo_type="model",
            revision=self._listing.commit,
            endpoint=self._hub.endpoint,
        )
        whole = partial.with_suffix(".xet.partial")
        with hub_errors(f"{self._listing}: {file.name}"):
            xet_get(
                incomplete_path=whole,
                xet_file_data=XetFileData(file.xet_hash, route),
                headers=self._hub.headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )
        with disk_errors(partial):
            whole.replace(partial)
        return True

    def report_to(self, advance: Advance) -> None:
        """Report progress to somebody else from now on."""
        self._advance = advance

    def step(self, count: int, file: RemoteFile) -> None:
        """Report bytes that are there.

        Raises:
            StoppedError: if the run is ending.
        """
        self._advance(count, file.name)
        if self._stop.is_set():
            raise StoppedError


def _write(output: IO[bytes], chunk: bytes, path: Path) -> None:
    with disk_errors(path):
        output.write(chunk)
