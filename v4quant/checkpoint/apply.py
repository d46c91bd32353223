"""Carry out a plan: fill output shards, prove every tensor, journal what is finished, and continue after a kill.

Within a shard, worker threads take one tensor each; while the finished shard is being synced to disk the next one is
already computed. config.json and the index are written last, so an unfinished folder is never taken for a checkpoint.
"""

import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import v4quant
from v4quant.checkpoint.certificate import (
    CERTIFICATE_NAME,
    CertificateHeader,
    RoundingRefusedError,
    TensorRecord,
    Verdict,
    worst_first,
)
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.journal import Journal, JournalHeader
from v4quant.checkpoint.layout import Shard
from v4quant.checkpoint.output import ShardFile, require_disk_space, write_file
from v4quant.checkpoint.plan import DEFAULT_WORKERS, Operation, Plan
from v4quant.checkpoint.run_folder import forget, holds_work, is_there, open_run, remove_partial_files, require_apart
from v4quant.checkpoint.side_files import write_side_files
from v4quant.checkpoint.sink import KeptShards, ShardSink
from v4quant.checkpoint.stream import StoppedError, Worker, convert_tensor
from v4quant.config import CONFIG_NAME
from v4quant.errors import InterruptedRunError, OutputError
from v4quant.formats.cast import Scratch

Advance = Callable[[int, str], None]
_SHOWN_ROUNDED = 5


@dataclass(frozen=True)
class ApplyReport:
    """What a conversion did.

    Attributes:
        verdicts: tensors by verdict.
        worst: the rounded tensors of the largest relative RMS error, worst first.
        certificate: path of the certificate.
        resumed_shards: shards that an earlier, interrupted run had finished.
    """

    verdicts: Counter[Verdict]
    worst: list[TensorRecord]
    certificate: Path
    resumed_shards: int


def apply(
    plan: Plan,
    out: Path,
    *,
    workers: int = DEFAULT_WORKERS,
    allow_rounding: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], Advance] | None = None,
    sink: ShardSink | None = None,
) -> ApplyReport:
    """Convert a checkpoint as planned, or continue a run of the same plan that was interrupted.

    Args:
        out: folder to write; made if missing.
        workers: threads; memory is theirs times a chunk.
        allow_rounding: accept tensors that lose bits; otherwise the first shard with one ends the run.
        overwrite: replace a checkpoint, or an unfinished run of another plan, in out.
        progress: told the source bytes that need not be read again; gives what is told bytes and shard from then on.
        sink: takes finished shards; by default they stay in out.

    Raises:
        CheckFailedError: if a tensor would be rounded and allow_rounding is False.
        CheckpointError: if a weight is not finite, or the source changed or cannot be read.
        OutputError: if out is in use or not free, or the disk is full or refuses.
        InterruptedRunError: at Ctrl-C; what is finished is kept.
    """
    sink = sink or KeptShards(plan, out)
    journal = _open_journal(plan, out, sink, overwrite=overwrite, allow_rounding=allow_rounding)
    run = _Run(plan, out, journal, workers, sink, allow_rounding=allow_rounding)
    try:
        resumed = len(journal.finished)
        run.write_shards(progress)
        write_side_files(plan.source, plan.like, plan.format, plan.side_files, out)
        report = _complete(plan, out, journal, resumed, sink)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted: {len(journal.finished)} of {len(plan.shards)} shards are finished and kept",
            hint="Run the same command again to continue.",
        ) from None
    finally:
        remove_partial_files(out)
        if journal.finished or holds_work(out):
            journal.close()
        else:
            forget(journal, out)
    return report


def _open_journal(plan: Plan, out: Path, sink: ShardSink, *, overwrite: bool, allow_rounding: bool) -> Journal:
    """Make the output folder ready, and begin or continue its journal."""
    require_apart(out, plan.folders)

    def resume(journal: Journal) -> None:
        there = {shard.name for shard in plan.shards if is_there(out / shard.name, shard.file_bytes)}
        safe = {shard.name for shard in plan.shards if shard.name in there or sink.holds(shard)}
        journal.finished &= safe
        require_disk_space(out, sink.disk_bytes - sum(s.file_bytes for s in plan.shards if s.name in there))
        if not allow_rounding:
            _require_exact_so_far(plan, journal)

    header = JournalHeader(plan.digest, plan.fingerprints())
    return open_run(out, header, sink.disk_bytes, overwrite=overwrite, resume=resume)


def _require_exact_so_far(plan: Plan, journal: Journal) -> None:
    """Refuse shards that an earlier run, which was allowed to, has rounded."""
    rounded = [record for record in journal.records() if record.verdict is Verdict.ROUNDED and _is_weight(record)]
    if rounded:
        raise RoundingRefusedError(f"the unfinished run in {journal.path.parent}", plan.format.name, rounded)


class _Run:
    """The shards of one run."""

    def __init__(
        self, plan: Plan, out: Path, journal: Journal, workers: int, sink: ShardSink, *, allow_rounding: bool
    ) -> None:
        self._plan = plan
        self._out = out
        self._journal = journal
        self._workers = workers
        self._sink = sink
        self._allow_rounding = allow_rounding
        self._stop = threading.Event()
        self._of_thread = threading.local()
        self._syncing: Future[None] | None = None

    def write_shards(self, progress: Callable[[int], Advance] | None) -> None:
        """Write the shards that are not finished yet."""
        self._sink.begin(self._journal.finished)
        todo = [shard for shard in self._plan.shards if shard.name not in self._journal.finished]
        left = sum(operation.bytes_read for shard in todo for operation in self._plan.operations[shard.name])
        advance = progress(self._plan.bytes_read - left) if progress else None
        started: deque[_OpenShard] = deque()
        with ThreadPoolExecutor(self._workers) as pool, ThreadPoolExecutor(1) as finisher:
            # A Ctrl-C while a thread starts makes its pool forget it; what this one does must be waited for.
            finisher.submit(_nothing).result()
            try:
                self._hand_over()
                for shard in todo:
                    # The next shard's tensors queue up before the last ones of this are done, so no worker waits.
                    started.append(self._start(shard, pool, advance))
                    if len(started) > 1:
                        self._complete(started, finisher)
                while started:
                    self._complete(started, finisher)
                if self._syncing is not None:
                    self._syncing.result()
            except BaseException:
                self._stop.set()
                self._sink.stop()
                for open_shard in started:
                    open_shard.abandon()
                raise

    def _hand_over(self) -> None:
        """Give the sink what a run before this one has finished and was killed before it gave it."""
        for shard in self._plan.shards:
            if shard.name in self._journal.finished and not self._sink.holds(shard):
                self._sink.take(shard, [r for r in self._journal.records() if r.tensor in shard.entries])

    def _start(self, shard: Shard, pool: ThreadPoolExecutor, advance: Advance | None) -> "_OpenShard":
        """Open a shard's partial file and queue its tensors."""
        file = ShardFile(self._out / shard.name, shard.header, shard.file_bytes)
        report = _named(advance, shard.name) if advance else _ignore
        tasks = [pool.submit(self._convert, task, file, report) for task in self._plan.operations[shard.name]]
        return _OpenShard(shard, file, tasks)

    def _complete(self, started: "deque[_OpenShard]", finisher: ThreadPoolExecutor) -> None:
        """Wait for the first open shard, prove it, and have it synced and journalled."""
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

    def _convert(self, operation: Operation, file: ShardFile, report: Callable[[int], None]) -> list[TensorRecord]:
        if not hasattr(self._of_thread, "scratch"):
            self._of_thread.scratch = Scratch()
        return convert_tensor(self._plan, operation, file, Worker(self._stop, report, self._of_thread.scratch))

    def _require_exact(self, shard: Shard, records: list[TensorRecord]) -> None:
        """Refuse rounding that nobody allowed; the whole shard is measured, so that the worst tensors can be named."""
        rounded = [record for record in records if record.verdict is Verdict.ROUNDED and _is_weight(record)]
        if rounded and not self._allow_rounding:
            raise RoundingRefusedError(shard.name, self._plan.format.name, rounded)

    def _finish(self, shard: Shard, file: ShardFile, records: list[TensorRecord]) -> None:
        file.finish()
        self._journal.append(shard.name, records)
        self._sink.take(shard, records)


@dataclass(frozen=True)
class _OpenShard:
    """A shard whose tensors are being computed."""

    shard: Shard
    file: ShardFile
    tasks: list[Future[list[TensorRecord]]]

    def abandon(self) -> None:
        """Give the shard up; the run's stop event is set already."""
        wait([task for task in self.tasks if not task.cancel()])
        self.file.abandon()


def _ignore(_count: int) -> None:
    """Report progress to nobody."""


def _nothing() -> None:
    """Let a thread start."""


def _named(advance: Advance, shard: str) -> Callable[[int], None]:
    return lambda count: advance(count, shard)


def _raise_first(finished: Iterable[Future[list[TensorRecord]]]) -> None:
    """Raise what went wrong; that a task was stopped because of it says nothing."""
    errors = [error for task in finished if (error := task.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, StoppedError)):
        raise error


def _is_weight(record: TensorRecord) -> bool:
    return record.tensor.endswith(".weight")


def _complete(plan: Plan, out: Path, journal: Journal, resumed: int, sink: ShardSink) -> ApplyReport:
    """Write certificate, index and config, in this order, and forget the journal."""
    verdicts: Counter[Verdict] = Counter()
    rounded: list[TensorRecord] = []

    def lines() -> Iterator[bytes]:
        yield _line(_certificate_header(plan).to_json())
        for record in journal.records():
            verdicts[record.verdict] += 1
            if record.verdict is Verdict.ROUNDED and _is_weight(record):
                rounded[:] = worst_first([*rounded, record])[:_SHOWN_ROUNDED]
            yield _line(record.to_json())

    write_file(out / CERTIFICATE_NAME, lines())
    if verdicts.total() != plan.tensors:
        raise OutputError(
            f"{journal.path}: has lines for {verdicts.total():,} tensors, expected {plan.tensors:,}",
            hint="The journal was edited or damaged; remove the folder and convert again.",
        )
    remove_partial_files(out)
    write_file(out / INDEX_NAME, [plan.index_bytes])
    write_file(out / CONFIG_NAME, [plan.config_bytes])
    sink.complete()
    journal.remove()
    return ApplyReport(verdicts, rounded, out / CERTIFICATE_NAME, resumed)


def _certificate_header(plan: Plan) -> CertificateHeader:
    return CertificateHeader(
        tool_version=v4quant.__version__,
        source_id=plan.source.source_id(),
        source_format=plan.source.scheme.name,
        target=plan.format.name,
        config_sha256=plan.config_sha256,
        tensors=plan.tensors,
    )


def _line(entry: dict[str, object]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
