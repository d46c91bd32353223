"""One journal for a run of several processes: the first process keeps it, the others send it what they finish.

A shard has its final name before its records are sent, and is noted in the order of arrival; a kill in between costs
that shard, as a kill between renaming and noting does in a run of one process. So what is left is a journal like any
other, which any number of processes can continue.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from v4quant.checkpoint.certificate import TensorRecord
from v4quant.checkpoint.journal import Journal
from v4quant.checkpoint.process_group import ProcessGroup
from v4quant.checkpoint.stream import StoppedError

_COLLECT_SECONDS = 0.1


class JournalKeeper:
    """The journal in the first process of a group."""

    def __init__(self, journal: Journal, group: ProcessGroup, shares: Sequence[Sequence[str]]) -> None:
        """Prepare.

        Args:
            journal: open and locked.
            group: the processes of the run, this one the first.
            shares: the shards of each process, by rank, in the order in which it finishes them.
        """
        self._journal = journal
        self._group = group
        self._shares = shares
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    def note(self, shard: str, records: Sequence[TensorRecord]) -> None:
        """Note a shard that this process has finished; from any thread."""
        with self._lock:
            self._journal.append(shard, records)

    @contextlib.contextmanager
    def collecting(self, stop: threading.Event) -> Iterator[None]:
        """Note the other processes' shards meanwhile, and afterwards until all of them are there.

        Args:
            stop: set if that fails, so that this process's own work ends too.

        Raises:
            Whatever the work raises; what went wrong in noting, where that stopped the work.
        """
        with ThreadPoolExecutor(1) as pool:
            collector = pool.submit(self._collect)
            collector.add_done_callback(lambda task: stop.set() if task.exception() else None)
            try:
                yield
                collector.result()
            except BaseException as error:
                self._is_over.set()
                if isinstance(error, StoppedError):
                    collector.result()
                raise

    def _collect(self) -> None:
        left = {rank: list(shards) for rank, shards in enumerate(self._shares) if rank and shards}
        while left and not self._is_over.wait(_COLLECT_SECONDS):
            for rank, shards in list(left.items()):
                while shards and (records := self._group.receive(_topic(shards[0]))) is not None:
                    where = f"process {rank} on {shards[0]}"
                    self.note(shards.pop(0), [TensorRecord.from_json(record, where) for record in records])
                if not shards:
                    del left[rank]


def send_records(group: ProcessGroup, shard: str, records: Sequence[TensorRecord]) -> None:
    """Have a shard noted that this process, not the first, has finished."""
    group.send(_topic(shard), [record.to_json() for record in records])


def _topic(shard: str) -> str:
    return f"shard/{shard}"
