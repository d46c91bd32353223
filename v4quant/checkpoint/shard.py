"""`shard`: a checkpoint into tensor-parallel files for DeepSeek's inference code, with nothing lost.

Every source file is read once, from front to back by one thread, hashed, and written into all rank files at offsets
known beforehand. So the rank files grow together: they keep their partial names until every source file is done, and a
run that was killed goes on with them. v4quant.shards.json comes last.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import v4quant
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.journal import Journal, JournalHeader
from v4quant.checkpoint.output import PARTIAL_SUFFIX, ShardFile, disk_errors, require_disk_space, write_file
from v4quant.checkpoint.plan import BASE_MEMORY_BYTES, CHUNK_BYTES, DEFAULT_WORKERS
from v4quant.checkpoint.reader import SHARDS_NAME, Checkpoint
from v4quant.checkpoint.run_folder import forget, is_there, open_run, remove_partial_files, require_apart
from v4quant.checkpoint.side_files import kept_files, require_side_files_fit, side_files, write_side_files
from v4quant.checkpoint.stream import Worker
from v4quant.checkpoint.tp_layout import FILE_PREFIX, HEADER_PREFIX, SourceFile, TpLayout, lay_out_ranks
from v4quant.checkpoint.tp_record import FileRecord, ShardsRecord
from v4quant.checkpoint.tp_rules import MOST_RANKS_LISTED, obstacles, working_ranks
from v4quant.checkpoint.tp_stream import piece_memory_bytes, scatter
from v4quant.checkpoint.units import Advance, work_through
from v4quant.encodings import BF16, FP4
from v4quant.errors import InterruptedRunError, UsageError
from v4quant.formats import FORMATS

# What of each weight file tells two checkpoints of the same shapes apart, at its data's beginning and end.
_SAMPLE_BYTES = 2**16
# Resident memory of a tensor's entry, on either side: measured on Pro in 16 ranks (600), rounded up.
_ENTRY_MEMORY_BYTES = 1_000


@dataclass(frozen=True)
class ShardPlan:
    """A sharding, decided.

    Attributes:
        source: the checkpoint.
        layout: every output file and where each tensor goes.
        fp8_experts: FP4 experts become FP8.
        run: hash over headers, a sample of the data and the options; stands in every output file.
        side_files: what is copied beside the ranks under its own name, for the code that loads them.
    """

    source: Checkpoint
    layout: TpLayout
    fp8_experts: bool
    run: str
    side_files: list[str]

    @property
    def tensors(self) -> int:
        """Tensors of the checkpoint."""
        return len(self.source.tensors)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of source tensors."""
        return self.source.bytes

    @property
    def bytes_written(self) -> int:
        """Bytes of tensor data in the rank files and the extra file."""
        return self.layout.bytes

    @cached_property
    def disk_bytes(self) -> int:
        """Bytes of all output files."""
        side = sum(self.source.files.size(name) for name in self.side_files)
        return self.layout.file_bytes + side + 4096 + 256 * (len(self.layout.placements) + len(self.kept))

    @cached_property
    def kept(self) -> list[str]:
        """Files without weights that the extra file keeps."""
        return kept_files(self.source)

    def peak_memory_bytes(self, workers: int) -> int:
        """Upper estimate of resident memory: the process, both sides' headers, and every worker's buffers."""
        entries = self.tensors + sum(len(file.entries) for file in self.layout.files)
        widest = max((piece_memory_bytes(p) for places in self.layout.placements.values() for p in places), default=0)
        return BASE_MEMORY_BYTES + _ENTRY_MEMORY_BYTES * entries + workers * widest

    def fingerprints(self) -> dict[str, str]:
        """What every file that is read looks like."""
        names = [*self.layout.placements, *self.kept]
        return {name: self.source.files.fingerprint(name) for name in sorted(names)}

    @cached_property
    def digest(self) -> str:
        """Identity of this plan."""
        headers = [[file.name, hashlib.sha256(file.header).hexdigest()] for file in self.layout.files]
        parts = {"version": v4quant.__version__, "run": self.run, "headers": headers, "side_files": self.side_files}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class ShardReport:
    """What a sharding did.

    Attributes:
        rounded: wo_a tensors that BF16 does not hold exactly; the extra file has them as they were.
        resumed_files: source files that an earlier, interrupted run had done.
    """

    rounded: int
    resumed_files: int


def plan_shard(source: Checkpoint, ranks: int, *, fp8_experts: bool = False) -> ShardPlan:
    """Plan the sharding of a sound checkpoint.

    Args:
        source: the checkpoint.
        ranks: N of model{i}-mp{N}.safetensors.
        fp8_experts: cast FP4 experts to FP8.

    Raises:
        CheckpointError: if the source has problems.
        UsageError: if this number of ranks does not work, or the experts cannot become FP8.
    """
    source.require_sound()
    require_side_files_fit(source)
    _require_ranks(source, ranks)
    if fp8_experts and source.scheme.expert == BF16:
        raise UsageError(
            f"{source.where}: --experts fp8 is for FP4 experts, found BF16",
            hint=f"Convert it first: v4quant convert {source.where} OUT --to fp8",
        )
    fp8_experts = fp8_experts and source.scheme.expert == FP4
    run = _run(source, ranks, fp8_experts=fp8_experts)
    kept = {name: source.files.size(name) for name in kept_files(source)}
    layout = lay_out_ranks(_source_files(source), kept, ranks, fp8_experts=fp8_experts, run=run)
    return ShardPlan(source, layout, fp8_experts, run, side_files(source))


def _require_ranks(source: Checkpoint, ranks: int) -> None:
    found = obstacles(source, ranks)
    if found:
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        working = ", ".join(map(str, working_ranks(source)))
        raise UsageError(
            f"{source.where}: --tp {ranks} does not work: {found[0]}{others}",
            hint=f"These work, up to {MOST_RANKS_LISTED}: {working}. See why with: "
            f"v4quant shard {source.where} OUT --explain",
        )


def _source_files(source: Checkpoint) -> list[SourceFile]:
    """The weight files, each with its tensors in the order of their data."""
    of_file: dict[str, list[TensorEntry]] = {name: [] for name in sorted(source.header_sha256)}
    for entry in source.tensors.values():
        of_file[entry.file].append(entry)
    for entries in of_file.values():
        entries.sort(key=lambda entry: (entry.start, entry.stop))
    return [
        SourceFile(name, entries[0].start if entries else source.files.size(name), entries)
        for name, entries in of_file.items()
    ]


def _run(source: Checkpoint, ranks: int, *, fp8_experts: bool) -> str:
    """What tells this run's files from those of another: headers, the ends of each file's data, and the options."""
    digest = hashlib.sha256(f"{source.source_id()}\0{ranks}\0{fp8_experts}".encode())
    for name in sorted(source.header_sha256):
        size = source.files.size(name)
        for start in (0, size - _SAMPLE_BYTES):
            digest.update(source.files.read(name, max(start, 0), min(max(start, 0) + _SAMPLE_BYTES, size)))
    return digest.hexdigest()


def apply_shard(
    plan: ShardPlan,
    out: Path,
    *,
    workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    progress: Callable[[int], Advance] | None = None,
) -> ShardReport:
    """Shard a checkpoint as planned, or continue a run of the same plan that was interrupted.

    Args:
        out: folder to write; made if missing.
        workers: threads.
        overwrite: replace what out holds.
        progress: told the source bytes that need not be read again; gives what is told bytes and file from then on.

    Raises:
        CheckFailedError: if an expert's values would change as FP8.
        CheckpointError: if a weight that is recoded is not finite, or the source changed or cannot be read.
        OutputError: if out is in use or not free, or the disk is full or refuses.
        InterruptedRunError: at Ctrl-C; what is finished is kept.
    """
    require_apart(out, [plan.source.where])
    header = JournalHeader(plan.digest, plan.fingerprints())
    journal = open_run(
        out, header, plan.disk_bytes, overwrite=overwrite, resume=lambda found: _resume(plan, out, found)
    )
    try:
        resumed = len(journal.finished)
        _write_ranks(plan, out, journal, workers, progress)
        report = _complete(plan, out, journal, resumed)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted: {len(journal.finished)} of {len(plan.layout.placements)} files are done and kept",
            hint="Run the same command again to continue.",
        ) from None
    finally:
        if journal.finished:
            journal.close()
        else:
            remove_partial_files(out)
            forget(journal, out)
    return report


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL_SUFFIX)


def _resume(plan: ShardPlan, out: Path, journal: Journal) -> None:
    """Go on with an earlier run's files; if one of them is gone or cut, nothing that went into it is finished."""
    sizes = {out / file.name: file.file_bytes for file in plan.layout.files}
    whole = {path for path, size in sizes.items() if is_there(path, size) or is_there(_partial(path), size)}
    if whole != sizes.keys():
        journal.finished = set()
    require_disk_space(out, plan.disk_bytes - sum(sizes[path] for path in whole))


def _write_ranks(
    plan: ShardPlan, out: Path, journal: Journal, workers: int, progress: Callable[[int], Advance] | None
) -> None:
    """Write what is not in the output files yet, and give them their names when all of it is."""
    places = plan.layout.placements
    todo = [name for name in places if name not in journal.finished]
    left = sum(place.source.bytes for name in todo for place in places[name])
    advance = progress(plan.bytes_read - left) if progress else None
    with ExitStack() as stack:
        outputs: dict[str, ShardFile] = {}
        for file in plan.layout.files:
            path = out / file.name
            if journal.finished and is_there(path, file.file_bytes):
                if not todo:
                    continue  # an earlier run was killed while it gave the files their names
                with disk_errors(path):
                    path.replace(_partial(path))  # the same, and its journal has lost its end
            outputs[file.name] = ShardFile(path, file.header, file.file_bytes, again=bool(journal.finished))
            stack.callback(outputs[file.name].leave)

        def work(name: str, worker: Worker) -> FileRecord:
            return _scatter_file(plan, name, outputs, worker)

        def finish(name: str, record: FileRecord) -> None:
            for output in outputs.values():
                output.sync()
            journal.append(name, [record])

        work_through(todo, work, finish, workers=workers, advance=advance)
        _write_kept(plan, outputs)
        for output in outputs.values():
            output.finish()


def _scatter_file(plan: ShardPlan, name: str, outputs: dict[str, ShardFile], worker: Worker) -> FileRecord:
    """Read a source file from front to back: its header into the extra file, its tensors to where they belong."""
    files, digest = plan.source.files, hashlib.sha256()
    kept = plan.layout.extra.entries[HEADER_PREFIX + name]
    header = files.read(name, 0, kept.bytes)
    digest.update(header)
    outputs[kept.file].write(header, kept.start)
    rounded = sum(scatter(files, place, outputs, worker, digest) > 0 for place in plan.layout.placements[name])
    files.require_unchanged(name)
    return FileRecord(name, files.size(name), digest.hexdigest(), rounded)


def _write_kept(plan: ShardPlan, outputs: dict[str, ShardFile]) -> None:
    """The files without weights, into the extra file; they are small, and written anew by each run."""
    for name in plan.kept:
        entry = plan.layout.extra.entries[FILE_PREFIX + name]
        if entry.file not in outputs:
            return
        for start in range(0, entry.bytes, CHUNK_BYTES):
            data = plan.source.files.read(name, start, min(start + CHUNK_BYTES, entry.bytes))
            outputs[entry.file].write(data, entry.start + start)


def _complete(plan: ShardPlan, out: Path, journal: Journal, resumed: int) -> ShardReport:
    """Copy the side files, write v4quant.shards.json, and forget the journal."""
    after = FORMATS["fp8" if plan.fp8_experts else plan.source.scheme.name]
    write_side_files(plan.source, None, after, plan.side_files, out)
    weights = {r.file: r for r in (FileRecord.from_json(line, str(journal.path)) for line in journal.objects())}
    kept = {name: _hashed(plan.source, name) for name in plan.kept}
    record = ShardsRecord(plan.run, plan.layout.ranks, plan.fp8_experts, weights, kept)
    remove_partial_files(out)
    write_file(out / SHARDS_NAME, [record.to_bytes(v4quant.__version__)])
    journal.remove()
    return ShardReport(sum(r.rounded for r in weights.values()), resumed)


def _hashed(source: Checkpoint, name: str) -> FileRecord:
    digest, size = hashlib.sha256(), source.files.size(name)
    for start in range(0, size, CHUNK_BYTES):
        digest.update(source.files.read(name, start, min(start + CHUNK_BYTES, size)))
    return FileRecord(name, size, digest.hexdigest())
