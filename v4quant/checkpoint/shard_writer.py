"""Write the shards of a conversion: threads take one tensor each, and a finished shard is proved, synced and noted.

While one shard is being synced to disk the next one is already computed.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from v4quant.checkpoint.certificate import RoundingRefusedError, TensorRecord, is_rounded_weight
from v4quant.checkpoint.layout import Shard
from v4quant.checkpoint.linked_files import LinkedFile
from v4quant.checkpoint.output import PARTIAL_SUFFIX, ShardFile
from v4quant.checkpoint.plan import Operation, Plan
from v4quant.checkpoint.stream import StoppedError, Worker, Writable, convert_tensor
from v4quant.formats.cast import Scratch

Advance = Callable[[int, str], None]


class ShardWriter:
    """Writes shards of one run.

    Attributes:
        stop: set it from any thread to end the run between two bands.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        *,
        workers: int,
        allow_rounding: bool,
        links: Mapping[str, str],
        token: str,
        advance: Advance,
        note: Callable[[str, list[TensorRecord]], None],
        stopped: Callable[[], None],
    ) -> None:
        """Prepare.

        Args:
            plan: what the shards hold.
            out: the folder that they are written to.
            workers: threads.
            allow_rounding: accept weights that lose bits.
            links: shards that are links to a source file already, and only read.
            token: makes the names of partial files this run's own, where several processes write into the folder.
            advance: told source bytes and shard, from any thread.
            note: told of each shard that is finished, one at a time, from a thread of its own.
            stopped: called when the run ends early, before the threads are waited for.
        """
        self._plan = plan
        self._out = out
        self._workers = workers
        self._allow_rounding = allow_rounding
        self._links = links
        self._partial_suffix = f".{token}{PARTIAL_SUFFIX}" if token else PARTIAL_SUFFIX
        self._advance = advance
        self._note = note
        self._stopped = stopped
        self.stop = threading.Event()
        self._of_thread = threading.local()
        self._syncing: Future[None] | None = None

    def write(self, shards: Iterable[Shard]) -> None:
        """Write shards, in order.

        Raises:
            CheckpointError, OutputError, RoundingRefusedError: as `apply`; what note and advance raise.
        """
        started: deque[_OpenShard] = deque()
        with ThreadPoolExecutor(self._workers) as pool, ThreadPoolExecutor(1) as finisher:
            # A Ctrl-C while a thread starts makes its pool forget it; what this one does must be waited for.
            finisher.submit(_nothing).result()
            try:
                for shard in shards:
                    # The next shard's tensors queue up before the last ones of this are done, so no worker waits.
                    started.append(self._start(shard, pool))
                    if len(started) > 1:
                        self._complete(started, finisher)
                while started:
                    self._complete(started, finisher)
                if self._syncing is not None:
                    self._syncing.result()
            except BaseException:
                self.stop.set()
                self._stopped()
                for open_shard in started:
                    open_shard.abandon()
                raise

    def _start(self, shard: Shard, pool: ThreadPoolExecutor) -> "_OpenShard":
        """Open a shard's partial file and queue its tensors."""
        path = self._out / shard.name
        file: ShardFile | LinkedFile
        if shard.name in self._links:
            file = LinkedFile(path, self._plan.source.files, self._links[shard.name])
        else:
            file = ShardFile(path, shard.header, shard.file_bytes, path.with_name(shard.name + self._partial_suffix))
        report = _named(self._advance, shard.name)
        tasks = [pool.submit(self._convert, task, file, report) for task in self._plan.operations[shard.name]]
        return _OpenShard(shard, file, tasks)

    def _complete(self, started: "deque[_OpenShard]", finisher: ThreadPoolExecutor) -> None:
        """Wait for the first open shard, prove it, and have it synced and noted."""
        shard, file, tasks = started[0].shard, started[0].file, started[0].tasks
        finished, _ = wait(tasks, return_when=FIRST_EXCEPTION)
        _raise_first(finished)
        place = {name: number for number, name in enumerate(shard.entries)}
        records = sorted((r for task in tasks for r in task.result()), key=lambda record: place[record.tensor])
        self._require_exact(shard, records)
        for name in {entry.file for operation in self._plan.operations[shard.name] for entry in operation.source}:
            self._plan.source.files.require_unchanged(name)
        # One shard is synced at a time: more would only queue up in memory.
        if self._syncing is not None:
            self._syncing.result()
        started.popleft()
        self._syncing = finisher.submit(self._finish, shard, file, records)

    def _convert(self, operation: Operation, file: Writable, report: Callable[[int], None]) -> list[TensorRecord]:
        if not hasattr(self._of_thread, "scratch"):
            self._of_thread.scratch = Scratch()
        return convert_tensor(self._plan, operation, file, Worker(self.stop, report, self._of_thread.scratch))

    def _require_exact(self, shard: Shard, records: list[TensorRecord]) -> None:
        """Refuse rounding that nobody allowed; the whole shard is measured, so that the worst tensors can be named."""
        rounded = [record for record in records if is_rounded_weight(record)]
        if rounded and not self._allow_rounding:
            raise RoundingRefusedError(shard.name, self._plan.format.name, rounded)

    def _finish(self, shard: Shard, file: ShardFile | LinkedFile, records: list[TensorRecord]) -> None:
        file.finish()
        self._note(shard.name, records)


@dataclass(frozen=True)
class _OpenShard:
    """A shard whose tensors are being computed."""

    shard: Shard
    file: ShardFile | LinkedFile
    tasks: list[Future[list[TensorRecord]]]

    def abandon(self) -> None:
        """Give the shard up; the run's stop event is set already."""
        wait([task for task in self.tasks if not task.cancel()])
        self.file.abandon()


def _nothing() -> None:
    """Let a thread start."""


def _named(advance: Advance, shard: str) -> Callable[[int], None]:
    return lambda count: advance(count, shard)


def _raise_first(finished: Iterable[Future[list[TensorRecord]]]) -> None:
    """Raise what went wrong; that a task was stopped because of it says nothing."""
    errors = [error for task in finished if (error := task.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, StoppedError)):
        raise error
