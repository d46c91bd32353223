"""A repository on the Hub as the files of a checkpoint: nothing is downloaded but the bytes that are read.

To open one takes config, index and the headers of the weight files, fetched side by side and kept by commit.
"""

import json
import struct
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from v4quant.checkpoint.header import LENGTH_BYTES, MAX_HEADER_BYTES
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.config import CONFIG_NAME
from v4quant.errors import HubError, UsageError
from v4quant.hub.client import Hub, connect
from v4quant.hub.commit_cache import CommitCache
from v4quant.hub.listing import Listing, RemoteFile, list_files, listing_from_json, resolve
from v4quant.hub.location import Location
from v4quant.hub.ranges import Ranges

# A file of up to so many bytes that holds no weights is fetched whole, checked, and kept.
_SMALL_BYTES = 16 * 2**20
_LISTING = "/listing"  # no file has such a name
_AT_A_TIME = 16
_WEIGHTS = ".safetensors"


class RemoteFiles:
    """The files of a repository at one commit; the hidden ones are left out. Implements Source.

    Attributes:
        listing: what the commit holds.
        where: hf://REPO_ID@COMMIT.
    """

    def __init__(self, hub: Hub, listing: Listing, cache: CommitCache) -> None:
        """Use `open_remote`."""
        self.listing = listing
        self.where = str(listing)
        self.ranges = Ranges(hub, listing)
        self._files = {name: file for name, file in listing.files.items() if not file.is_hidden}
        self._cache = cache
        self._heads: dict[str, bytes] = {}
        self._locks = {name: threading.Lock() for name in self._files}

    @property
    def bytes_fetched(self) -> int:
        """Bytes of content that came over the network so far."""
        return self.ranges.bytes_fetched

    def names(self) -> list[str]:
        """Paths of all files, sorted."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def file(self, name: str) -> RemoteFile:
        """What the listing says of a file."""
        return self._files[name]

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._files[name].size

    def fingerprint(self, name: str) -> str:
        """Size and hash of the content, the same at every commit that holds it."""
        return f"{self.size(name)} {self._files[name].digest}"

    def noted_sha256(self, name: str) -> str | None:
        """The hash that the Hub lists of a large file."""
        return self._files[name].sha256

    def path(self, name: str) -> Path:
        """No file of it is on this disk under its name.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.where}/{name}: is on the Hub, expected a local file", hint="Get it with: v4quant download"
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes [start, stop) of a file, all of it by default.

        Raises:
            HubError: if they cannot be had, or are not those that the Hub lists.
        """
        buffer = bytearray((self.size(name) if stop is None else stop) - start)
        self.read_into(name, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on; safe from any thread.

        Raises:
            HubError: if they cannot be had, or are not those that the Hub lists.
        """
        stop = start + len(buffer)
        head = self._head(name)
        if stop <= len(head):
            buffer[:] = head[start:stop]
            return
        done = 0

        def take(chunk: bytes) -> None:
            nonlocal done
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)

        self.ranges.fetch(self._files[name], start, stop, take)

    def require_unchanged(self, name: str) -> None:
        """Nothing to check: a commit does not change, and each answer was compared with its listing."""

    def prefetch(self, names: Iterable[str]) -> None:
        """Get the heads of several files side by side: headers of weight files, and small files whole.

        Raises:
            HubError: if one cannot be had.
        """
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            for _ in pool.map(self._head, list(names)):
                pass

    def _head(self, name: str) -> bytes:
        """The first bytes of a file, kept: a weight file's header, a small file's whole content, of others nothing."""
        if name in self._heads:
            return self._heads[name]
        file = self._files[name]
        if not name.endswith(_WEIGHTS) and file.size > _SMALL_BYTES:
            return b""
        with self._locks[name]:  # several threads want the same head at once
            if name not in self._heads:
                self._heads[name] = self._kept(file)
        return self._heads[name]

    def _kept(self, file: RemoteFile) -> bytes:
        found = self._cache.get(file.name)
        if found is None:
            found = self._header(file) if file.name.endswith(_WEIGHTS) else self._whole(file)
            self._cache.put(file.name, found)
        return found

    def _whole(self, file: RemoteFile) -> bytes:
        data = self._fetched(file, 0, file.size)
        digest = file.hasher()
        digest.update(data)
        if digest.hexdigest() != file.digest:
            raise HubError(
                f"{self.where}: {file.name}: arrives with hash {digest.hexdigest()[:16]}..., the Hub lists "
                f"{file.digest[:16]}...",
                hint="Run it again; if that does not help, the file is damaged on the Hub.",
            )
        return data

    def _header(self, file: RemoteFile) -> bytes:
        """Length and header; the length alone where it cannot be right, which the reader then says."""
        start = self._fetched(file, 0, min(LENGTH_BYTES, file.size))
        if len(start) < LENGTH_BYTES:
            return start
        (length,) = struct.unpack("<Q", start)
        stop = LENGTH_BYTES + length
        if length > MAX_HEADER_BYTES or stop > file.size:
            return start
        return start + self._fetched(file, LENGTH_BYTES, stop)

    def _fetched(self, file: RemoteFile, start: int, stop: int) -> bytes:
        parts: list[bytes] = []
        self.ranges.fetch(file, start, stop, parts.append)
        return b"".join(parts)


def open_remote(location: Location, hub: Hub | None = None) -> RemoteFiles:
    """Look a repository up: its commit, and what that holds.

    Raises:
        HubError: if there is no such repository or revision, or the Hub cannot be reached.
        CheckpointError: if it holds names that are not safe.
    """
    hub = hub or connect()
    commit = resolve(hub, location)
    cache = CommitCache(hub.endpoint, location.repo_id, commit)
    return RemoteFiles(hub, _listing(hub, location, commit, cache), cache)


def prefetch_checkpoint(files: RemoteFiles) -> None:
    """Get what opening a checkpoint reads: config, index, and the headers of the weight files.

    Raises:
        HubError: if one cannot be had.
    """
    wanted = {CONFIG_NAME, INDEX_NAME}
    files.prefetch(n for n in files.names() if "/" not in n and (n in wanted or n.endswith(_WEIGHTS)))


def _listing(hub: Hub, location: Location, commit: str, cache: CommitCache) -> Listing:
    kept = cache.get(_LISTING)
    if kept is not None:
        try:
            return listing_from_json(kept, location, commit)
        except ValueError:
            pass  # of another version, or damaged: ask again
    listing = list_files(hub, location, commit)
    rows = [[f.name, f.size, f.sha256, f.git_sha1, f.xet_hash] for f in listing.files.values()]
    cache.put(_LISTING, json.dumps(rows).encode())
    return listing
