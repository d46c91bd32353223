"""Carry out a plan: fill output shards, prove every tensor, journal what is finished, and continue after a kill.

Several processes share the shards out by bytes; the first keeps the journal and writes what exists once. config.json
and the index are written last, so an unfinished folder is never taken for a checkpoint.
"""

import contextlib
import functools
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import v4quant
from v4quant.checkpoint.certificate import (
    CERTIFICATE_NAME,
    CertificateHeader,
    RoundingRefusedError,
    TensorRecord,
    Verdict,
    is_rounded_weight,
    verdict_counts,
    worst_first,
)
from v4quant.checkpoint.file_stamp import seen_differently
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.journal import Journal, JournalHeader
from v4quant.checkpoint.journal_keeper import JournalKeeper, send_records
from v4quant.checkpoint.layout import Shard
from v4quant.checkpoint.linked_files import is_link, linkable, make_links, remove_links
from v4quant.checkpoint.output import PARTIAL_SUFFIX, require_disk_space, write_file
from v4quant.checkpoint.plan import DEFAULT_WORKERS, Plan
from v4quant.checkpoint.process_group import ProcessGroup
from v4quant.checkpoint.run_folder import forget, holds_work, is_there, open_run, remove_partial_files, require_apart
from v4quant.checkpoint.shard_writer import Advance, ShardWriter
from v4quant.checkpoint.shares import share_files
from v4quant.checkpoint.side_files import write_side_files
from v4quant.checkpoint.sink import KeptShards, ShardSink
from v4quant.config import CONFIG_NAME
from v4quant.errors import CheckpointError, InterruptedRunError, OutputError

_SHOWN_ROUNDED = 5


@dataclass(frozen=True)
class ApplyReport:
    """What a conversion did.

    Attributes:
        verdicts: tensors by verdict.
        worst: the rounded tensors of the largest relative RMS error, worst first.
        certificate: path of the certificate.
        resumed_shards: shards that an earlier, interrupted run had finished.
        linked_files: shards that are hard links to files of the source.
    """

    verdicts: Counter[Verdict]
    worst: list[TensorRecord]
    certificate: Path
    resumed_shards: int
    linked_files: int

    def to_json(self) -> dict[str, Any]:
        """The report for the other processes."""
        worst = [record.to_json() for record in self.worst]
        counts = verdict_counts(self.verdicts)
        return {"verdicts": counts, "worst": worst, "shards": [self.resumed_shards, self.linked_files]}

    @classmethod
    def from_json(cls, values: dict[str, Any], certificate: Path) -> "ApplyReport":
        """The first process's report."""
        verdicts = Counter({Verdict(verdict): count for verdict, count in values["verdicts"].items()})
        worst = [TensorRecord.from_json(record, "process 0") for record in values["worst"]]
        return cls(verdicts, worst, certificate, *values["shards"])


def apply(
    plan: Plan,
    out: Path,
    *,
    workers: int = DEFAULT_WORKERS,
    allow_rounding: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], Advance] | None = None,
    group: ProcessGroup | None = None,
    sink: ShardSink | None = None,
) -> ApplyReport:
    """Convert a checkpoint as planned, or continue a run of the same plan that was interrupted.

    Args:
        out: folder to write; made if missing.
        workers: threads; memory is theirs times a chunk.
        allow_rounding: accept tensors that lose bits; otherwise the first shard with one ends the run.
        overwrite: replace a checkpoint, or an unfinished run of another plan, in out.
        progress: told the source bytes that need not be read again; gives what is told bytes and shard from then on.
        group: the processes that call this with the same plan and folder, to share the shards out; one by default.
        sink: takes finished shards, in a run of one process; by default they stay in out.

    Raises:
        CheckFailedError: if a tensor would be rounded and allow_rounding is False.
        CheckpointError: if a weight is not finite, or the source changed or cannot be read.
        OutputError: if out is in use or not free, or the disk is full or refuses.
        InterruptedRunError: at Ctrl-C; what is finished is kept.
        EndedElsewhereError, LostProcessError: if another process has failed or died; what is finished is kept.
    """
    run = _Run(plan, out, group or ProcessGroup(), sink or KeptShards(plan, out), allow_rounding=allow_rounding)
    try:
        with run.group.ending_together():
            run.open(overwrite=overwrite)
            run.write_shards(workers, progress)
            return run.complete()
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted: {run.finished_so_far} finished and kept", hint="Run the same command again to continue."
        ) from None
    finally:
        run.leave()


class _Run:
    """One run, as one of its processes sees it.

    Attributes:
        group: the processes.
        finished: shards that were whole when the run began.
        links: shards that are links to a source file, by name the file.
    """

    def __init__(self, plan: Plan, out: Path, group: ProcessGroup, sink: ShardSink, *, allow_rounding: bool) -> None:
        self.group = group
        self.finished: set[str] = set()
        self.links: dict[str, str] = {}
        self._plan = plan
        self._out = out
        self._sink = sink
        self._allow_rounding = allow_rounding
        self._journal: Journal | None = None  # in the first process

    @property
    def finished_so_far(self) -> str:
        """What an interrupted run keeps."""
        if self._journal is None:
            return "what was written is"
        return f"{len(self._journal.finished)} of {len(self._plan.shards)} shards are"

    def open(self, *, overwrite: bool) -> None:
        """Begin or continue the run; the first process makes the folder ready and tells the others what is there.

        Raises:
            CheckFailedError, CheckpointError, OutputError: as `apply`.
        """
        require_apart(self._out, self._plan.folders)
        mark = self._out / f"v4quant.{self.group.token}{PARTIAL_SUFFIX}"
        if self.group.is_first:
            self._open_journal(overwrite=overwrite)
            if self.group.size > 1:
                write_file(mark, [])
        plan = self._plan
        found = self.group.broadcast([plan.digest, plan.fingerprints(), sorted(self.finished), self.links])
        if not self.group.is_first:
            digest, fingerprints, finished, self.links = found
            self.finished = set(finished)
            self._require_same_run(digest, fingerprints, mark)
        self.group.barrier()  # nobody writes before all have agreed

    def _open_journal(self, *, overwrite: bool) -> None:
        """Make the output folder ready, begin or continue its journal, and make the links."""
        plan, files = self._plan, self._plan.source.files
        wanted = linkable(files, self._out, plan.unchanged_files)

        def resume(journal: Journal) -> None:
            there = {shard.name for shard in plan.shards if self._is_there(shard)}
            journal.finished &= there | {shard.name for shard in plan.shards if self._sink.holds(shard)}
            require_disk_space(self._out, self._sink.disk_bytes - plan.linked_bytes(there | wanted.keys()))
            if not self._allow_rounding:
                _require_exact_so_far(plan, journal)

        header = JournalHeader(plan.digest, plan.fingerprints())
        disk_bytes = self._sink.disk_bytes - plan.linked_bytes(wanted)
        self._journal = open_run(self._out, header, disk_bytes, overwrite=overwrite, resume=resume)
        self.finished = set(self._journal.finished)
        remove_partial_files(self._out)
        wanted = {name: source for name, source in wanted.items() if name not in self.finished}
        self.links = make_links(files, self._out, wanted)
        require_disk_space(self._out, plan.linked_bytes(wanted.keys() - self.links.keys()))

    def _is_there(self, shard: Shard) -> bool:
        """True if a shard is whole, as a file of its own or as a link."""
        path, source = self._out / shard.name, self._plan.unchanged_files.get(shard.name)
        return is_there(path, shard.file_bytes) or (
            source is not None and is_link(self._plan.source.files, source, path)
        )

    def _require_same_run(self, digest: str, fingerprints: dict[str, str], mark: Path) -> None:
        """Check in another process that it takes part in the first one's run.

        Raises:
            CheckpointError: if it has another plan, or sees another version of a file.
            OutputError: if it has another folder.
        """
        who = f"process {self.group.rank} on {socket.gethostname()}"
        if digest != self._plan.digest:
            raise CheckpointError(
                f"{self._plan.source.where}: {who} reads another checkpoint there than process 0",
                hint="Give all processes the same source and options, and the same version of v4quant.",
            )
        if changed := seen_differently(self._plan.fingerprints(), fingerprints):
            raise CheckpointError(
                f"{self._plan.source.where}: {who} sees another version of {changed[0]} there than process 0",
                hint="Leave the source alone while it is read, and give a folder that all machines share.",
            )
        if not mark.is_file():
            raise OutputError(
                f"{self._out}: is another folder for {who} than for process 0",
                hint="Give a folder that all machines share.",
            )

    def write_shards(self, workers: int, progress: Callable[[int], Advance] | None) -> None:
        """Write this process's share of the shards that are not finished yet."""
        plan = self._plan
        todo = {shard.name: shard for shard in plan.shards if shard.name not in self.finished}
        left = {name: sum(operation.bytes_read for operation in plan.operations[name]) for name in todo}
        costs = {name: left[name] + (0 if name in self.links else shard.file_bytes) for name, shard in todo.items()}
        shares = share_files(costs, self.group.size)
        if self._journal is not None:
            self._sink.begin(self.finished)
            self._hand_over(self._journal)
        keeper = JournalKeeper(self._journal, self.group, shares) if self._journal else None
        writer = ShardWriter(
            plan,
            self._out,
            workers=workers,
            allow_rounding=self._allow_rounding,
            links=self.links,
            token=self.group.token,
            advance=self.group.progress(progress(plan.bytes_read - sum(left.values())) if progress else _ignore),
            note=functools.partial(self._note, keeper) if keeper else functools.partial(send_records, self.group),
            stopped=self._sink.stop,
        )
        with keeper.collecting(writer.stop) if keeper else contextlib.nullcontext():
            writer.write(todo[name] for name in shares[self.group.rank])

    def _hand_over(self, journal: Journal) -> None:
        """Give the sink what a run before this one has finished and was killed before it gave it."""
        for shard in self._plan.shards:
            if shard.name in self.finished and not self._sink.holds(shard):
                self._sink.take(shard, [r for r in journal.records() if r.tensor in shard.entries])

    def _note(self, keeper: JournalKeeper, name: str, records: list[TensorRecord]) -> None:
        """Note a finished shard, and give it to the sink."""
        keeper.note(name, records)
        self._sink.take(next(shard for shard in self._plan.shards if shard.name == name), records)

    def complete(self) -> ApplyReport:
        """Write side files, certificate, index and config, in this order, and forget the journal."""
        certificate = self._out / CERTIFICATE_NAME
        if self._journal is None:
            return ApplyReport.from_json(self.group.broadcast(None), certificate)
        plan, files = self._plan, self._plan.source.files
        write_side_files(plan.source, plan.like, plan.format, plan.side_files, self._out)
        verdicts, worst = _write_certificate(plan, certificate, self._journal)
        remove_partial_files(self._out)
        write_file(self._out / INDEX_NAME, [plan.index_bytes])
        write_file(self._out / CONFIG_NAME, [plan.config_bytes])
        self._sink.complete()
        self._journal.remove()
        linked = sum(is_link(files, source, self._out / name) for name, source in plan.unchanged_files.items())
        report = ApplyReport(verdicts, worst, certificate, len(self.finished), linked)
        self.group.broadcast(report.to_json())
        return report

    def leave(self) -> None:
        """Tidy up, in the first process, after the others have stopped."""
        if self._journal is None:
            return
        remove_partial_files(self._out)
        if not self._journal.finished:
            remove_links(self._plan.source.files, self._out, self.links)
        if self._journal.finished or holds_work(self._out):
            self._journal.close()
        else:
            forget(self._journal, self._out)


def _require_exact_so_far(plan: Plan, journal: Journal) -> None:
    """Refuse shards that an earlier run, which was allowed to, has rounded."""
    rounded = [record for record in journal.records() if is_rounded_weight(record)]
    if rounded:
        raise RoundingRefusedError(f"the unfinished run in {journal.path.parent}", plan.format.name, rounded)


def _ignore(_count: int, _shard: str) -> None:
    """Report progress to nobody."""


def _write_certificate(plan: Plan, path: Path, journal: Journal) -> tuple[Counter[Verdict], list[TensorRecord]]:
    """Write the certificate from the journal; returns verdicts and the worst rounded tensors."""
    verdicts: Counter[Verdict] = Counter()
    rounded: list[TensorRecord] = []

    def lines() -> Iterator[bytes]:
        yield _line(_certificate_header(plan).to_json())
        for record in journal.records():
            verdicts[record.verdict] += 1
            if is_rounded_weight(record):
                rounded[:] = worst_first([*rounded, record])[:_SHOWN_ROUNDED]
            yield _line(record.to_json())

    write_file(path, lines())
    if verdicts.total() != plan.tensors:
        raise OutputError(
            f"{journal.path}: has lines for {verdicts.total():,} tensors, expected {plan.tensors:,}",
            hint="The journal was edited or damaged; remove the folder and convert again.",
        )
    return verdicts, rounded


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
