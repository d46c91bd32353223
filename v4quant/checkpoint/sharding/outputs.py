"""The output files of a sharding: opened when something goes into them, named when all of it has.

A source file's tensors go into files of many ranks, and a rank's file takes in tensors of many source files. So the
output files grow together: each keeps its partial name until the last source file that it waits for is done.
"""

import contextlib
import resource
import threading
from collections.abc import Iterable
from pathlib import Path

from v4quant.checkpoint.output import PARTIAL_SUFFIX, ShardFile, disk_errors
from v4quant.checkpoint.run_folder import is_there
from v4quant.checkpoint.sharding.layout import ShardedLayout

# Descriptors of an output file (one of them for direct I/O), and those that the process may have besides.
_DESCRIPTORS = 2
_OTHER_DESCRIPTORS = 200


def partial_path(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


class Outputs:
    """The output files of one run, by name; safe from any thread."""

    def __init__(self, out: Path, layout: ShardedLayout, finished: Iterable[str]) -> None:
        """Make the folders.

        Args:
            finished: source files whose bytes are in the output files already, left by an earlier run.

        Raises:
            OutputError: if the disk refuses.
        """
        self._out = out
        self._layout = layout
        self._shards = {file.name: file for file in layout.files}
        self._open: dict[str, ShardFile] = {}
        self._lock = threading.Lock()
        self._waits_for: dict[str, set[str]] = {name: set() for name in self._shards}
        self._begun: set[str] = set()
        for source, files in files_of(layout).items():
            for name in files:
                if source in finished:
                    self._begun.add(name)
                else:
                    self._waits_for[name].add(source)
        for path in {out / name for name in self._shards}:
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        _allow_open_files(_DESCRIPTORS * len(self._shards) + _OTHER_DESCRIPTORS)

    def __getitem__(self, name: str) -> ShardFile:
        """A file, opened if it is not yet."""
        with self._lock:
            if name not in self._open:
                self._open[name] = self._begin(name)
            return self._open[name]

    def _begin(self, name: str) -> ShardFile:
        shard, path = self._shards[name], self._out / name
        again = name in self._begun
        if again and is_there(path, shard.file_bytes):
            with disk_errors(path):
                path.replace(partial_path(path))  # it was whole, but the journal has lost its end
        return ShardFile(path, shard.header, shard.file_bytes, again=again)

    def sync(self, source: str) -> None:
        """Make durable what a source file has put into the output files.

        Raises:
            OutputError: if the disk refuses.
        """
        for name, sources in self._waits_for.items():
            if source in sources:
                self[name].sync()

    def finish(self, source: str) -> None:
        """Note that a source file is journalled, and name what waits for nothing more, but for the extra file.

        Raises:
            OutputError: if the disk refuses.
        """
        for name, sources in self._waits_for.items():
            if source in sources:
                sources.remove(source)
                self._begun.add(name)
                if not sources and name != self._layout.extra.name:
                    self._name(name)

    def finish_all(self) -> None:
        """Name every file that has not got its name yet.

        Raises:
            OutputError: if the disk refuses.
        """
        for name in self._shards:
            if name in self._open or not self.is_named(name):
                self._name(name)

    def is_named(self, name: str) -> bool:
        """True if a file is whole and has its name."""
        return is_there(self._out / name, self._shards[name].file_bytes)

    def _name(self, name: str) -> None:
        self[name].finish()
        del self._open[name]

    def leave(self) -> None:
        """Close what is open and keep it, for a run that goes on with it."""
        for file in self._open.values():
            file.leave()


def files_of(layout: ShardedLayout) -> dict[str, set[str]]:
    """For each source file the output files that something of it goes into."""
    return {
        source: {layout.extra.name, *(name for place in places for name in place.files)}
        for source, places in layout.placements.items()
    }


def _allow_open_files(count: int) -> None:
    """Raise the process's own limit of open files, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        with contextlib.suppress(ValueError, OSError):
            most = count if hard == resource.RLIM_INFINITY else min(count, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
