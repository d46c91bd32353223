"""A remote checkpoint read shard by shard: a few source shards lie on disk at a time, fetched ahead, then removed.

Which shards these are follows from the plan: those that the output shards being made need, and the next one's. So the
most that they ever take is known before the start (`spool_bytes`). A shard is read only after its sha256 was checked.
What is small, and headers, comes from the remote files themselves.
"""

import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from v4quant.checkpoint.output import disk_errors
from v4quant.checkpoint.plan import Plan
from v4quant.checkpoint.stream import StoppedError
from v4quant.errors import CheckpointError, UsageError
from v4quant.hub.client import Hub
from v4quant.hub.fetch import Fetcher
from v4quant.hub.fetch import StoppedError as FetchStoppedError
from v4quant.hub.remote_files import RemoteFiles

# While output shard n is synced or uploaded, n + 1 is complete and n + 2 is made; the source of n + 3 is fetched.
SHARDS_AHEAD = 3
_DOWNLOADS = 3
_SPOOL = "spool"


class Schedule:
    """When each source shard is needed.

    Attributes:
        first, last: number of the first and the last output shard that needs a source shard.
    """

    def __init__(self, plan: Plan, todo: Sequence[str]) -> None:
        """Work out the needs of the output shards that are still to be made."""
        self.first: dict[str, int] = {}
        self.last: dict[str, int] = {}
        for number, shard in enumerate(todo):
            for name in sorted({entry.file for operation in plan.operations[shard] for entry in operation.source}):
                self.first.setdefault(name, number)
                self.last[name] = number

    def wanted(self, done: int) -> list[str]:
        """Source shards to have when so many output shards are done, in the order of need."""
        names = [n for n in self.first if self.last[n] >= done and self.first[n] <= done + SHARDS_AHEAD]
        return sorted(names, key=lambda name: self.first[name])


def spool_bytes(plan: Plan) -> int:
    """The most that source shards take on disk at a time, in a whole run."""
    schedule = Schedule(plan, [shard.name for shard in plan.shards])
    size = plan.source.files.size
    return max((sum(map(size, schedule.wanted(done))) for done in range(len(plan.shards))), default=0)


class Spool:
    """The files of a remote checkpoint, weights by way of the disk. Implements Source.

    Attributes:
        where: hf://REPO_ID@COMMIT.
    """

    def __init__(self, hub: Hub, remote: RemoteFiles, state: Path) -> None:
        """Nothing is fetched before `start`.

        Args:
            state: hidden folder of the output.
        """
        self.where = remote.where
        self._remote = remote
        self._folder = state / _SPOOL
        self._stop = threading.Event()
        self._fetcher = Fetcher(hub, remote.listing, remote.ranges, self._folder, _ignore, self._stop)
        self._pool = ThreadPoolExecutor(_DOWNLOADS)
        self._lock = threading.Lock()
        self._here: dict[str, Future[int]] = {}  # open descriptor of each shard
        self._schedule: Schedule | None = None
        self._numbers: dict[str, int] = {}
        self._done = 0

    def start(self, plan: Plan, todo: Sequence[str]) -> None:
        """Begin to fetch; what an earlier run left and this one does not need is removed.

        Args:
            todo: names of the output shards that are to be made, in order.

        Raises:
            OutputError: if the disk refuses.
        """
        self._schedule = Schedule(plan, todo)
        self._numbers = {name: number for number, name in enumerate(todo)}
        kept = {self._path(name).name for name in self._schedule.first}
        kept |= {self._fetcher.partial(self._remote.file(name)).name for name in self._schedule.first}
        with disk_errors(self._folder):
            if self._folder.is_symlink() or self._folder.parent.is_symlink():
                raise OSError(f"{self._folder} is a link")
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                if path.name not in kept:
                    path.unlink()
        self._fetch_ahead()

    def finished(self, shard: str) -> None:
        """An output shard is done: remove what nobody needs any more, fetch what is needed next."""
        number = self._numbers.get(shard)
        if number is None or self._schedule is None:
            return
        with self._lock:
            self._done = max(self._done, number + 1)
            wanted = set(self._schedule.wanted(self._done))
            gone = {name: task for name, task in self._here.items() if name not in wanted}
            for name in gone:
                del self._here[name]
        for name, task in gone.items():
            os.close(task.result())
            with disk_errors(self._path(name)):
                self._path(name).unlink()
        self._fetch_ahead()

    def stop(self) -> None:
        """End all fetching; what is there stays for the next run."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End all fetching, and let go of the shards."""
        self.stop()
        self._pool.shutdown(wait=True)
        for task in self._here.values():
            if not task.cancelled() and task.exception() is None:
                os.close(task.result())
        self._here.clear()

    def remove(self) -> None:
        """Remove the spool; the run is complete.

        Raises:
            OutputError: if the disk refuses.
        """
        self.close()
        with disk_errors(self._folder):
            if self._folder.is_dir():
                for path in self._folder.iterdir():
                    path.unlink()
                self._folder.rmdir()
        with contextlib.suppress(OSError):  # another run's things are in it
            self._folder.parent.rmdir()

    def names(self) -> list[str]:
        """Paths of all files, sorted."""
        return self._remote.names()

    def __contains__(self, name: str) -> bool:
        return name in self._remote

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._remote.size(name)

    def fingerprint(self, name: str) -> str:
        """Size and hash of the content."""
        return self._remote.fingerprint(name)

    def require_unchanged(self, name: str) -> None:
        """Nothing to check: a commit does not change."""

    def noted_sha256(self, name: str) -> str | None:
        """The hash that the Hub lists of a large file."""
        return self._remote.noted_sha256(name)

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
            V4QuantError: as read_into.
        """
        buffer = bytearray((self.size(name) if stop is None else stop) - start)
        self.read_into(name, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on, once the shard is here; safe from any thread.

        Raises:
            HubError: if the shard cannot be had.
            CheckpointError: if it arrives damaged.
            OutputError: if the disk refuses.
            StoppedError: if the run is ending.
        """
        if self._schedule is None or name not in self._schedule.first:
            self._remote.read_into(name, start, buffer)
            return
        descriptor = self._descriptor(name)
        done = 0
        with disk_errors(self._path(name)):
            while done < len(buffer) and (count := os.preadv(descriptor, [buffer[done:]], start + done)):
                done += count
        if done < len(buffer):
            raise CheckpointError(f"{self._path(name)}: is shorter than its {self.size(name):,} bytes")

    def _descriptor(self, name: str) -> int:
        with self._lock:
            task = self._here.get(name)
        if task is None or task.cancelled() or self._stop.is_set():
            raise StoppedError
        return task.result()

    def _fetch_ahead(self) -> None:
        assert self._schedule is not None
        with self._lock:
            for name in self._schedule.wanted(self._done):
                if name not in self._here and not self._stop.is_set():
                    self._here[name] = self._pool.submit(self._fetch, name)

    def _fetch(self, name: str) -> int:
        """Bring a shard here; returns its open descriptor."""
        file, path = self._remote.file(name), self._path(name)
        try:
            if not (path.is_file() and path.stat().st_size == file.size):
                self._fetcher.fetch(file, path)
        except FetchStoppedError:
            raise StoppedError from None
        with disk_errors(path):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def _path(self, name: str) -> Path:
        return self._folder / f"{self._remote.file(name).key}.shard"


def _ignore(_count: int, _file: str) -> None:
    """Report progress to nobody; the conversion reports what it reads."""
