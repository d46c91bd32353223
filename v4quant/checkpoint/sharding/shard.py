"""`shard`: a checkpoint into what each rank of a grid holds, with nothing lost.

Every source file is read once, from front to back by one thread, hashed, and written into the files of all ranks at
offsets known beforehand (outputs.py); a run that was killed goes on with what is there. v4quant.shards.json comes last.
The source may be a sharded folder itself (whole.py): so any split becomes any other.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import v4quant
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.journal import Journal, JournalHeader
from v4quant.checkpoint.layout import Packing
from v4quant.checkpoint.output import require_disk_space, write_file
from v4quant.checkpoint.plan import BASE_MEMORY_BYTES, CHUNK_BYTES, DEFAULT_MAX_SHARD_BYTES, DEFAULT_WORKERS
from v4quant.checkpoint.reader import SHARDS_NAME, Checkpoint
from v4quant.checkpoint.run_folder import forget, is_there, open_run, remove_partial_files, require_apart
from v4quant.checkpoint.sharding.certificates import write_rank_certificates
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.checkpoint.sharding.hashes import FileHash, ShareRecord, TensorHashes
from v4quant.checkpoint.sharding.layout import ShardedLayout, SourceFile, lay_out_ranks
from v4quant.checkpoint.sharding.outputs import Outputs, files_of, partial_path
from v4quant.checkpoint.sharding.rank_files import FILE_PREFIX, HEADER_PREFIX, Run, rank_folder
from v4quant.checkpoint.sharding.rank_folder import files_beside
from v4quant.checkpoint.sharding.record import FileRecord, ShardsRecord, require_sound_names
from v4quant.checkpoint.sharding.rules import MOST_RANKS_LISTED, Layout, obstacles, working_shares
from v4quant.checkpoint.sharding.stream import piece_memory_bytes, scatter
from v4quant.checkpoint.sharding.units import Advance, work_through
from v4quant.checkpoint.sharding.whole import WholeFiles
from v4quant.checkpoint.side_files import kept_files, require_side_files_fit, side_files, write_side_files
from v4quant.checkpoint.stream import Worker
from v4quant.config import CONFIG_NAME
from v4quant.encodings import BF16, FP4
from v4quant.errors import CheckFailedError, CheckpointError, InterruptedRunError, OutputError, UsageError
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
        side_files: what is copied beside the ranks under its own name, for the code that loads them.
    """

    source: Checkpoint
    layout: ShardedLayout
    side_files: list[str]

    @property
    def run(self) -> Run:
        """Grid, layout and options."""
        return self.layout.run

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
        record = 4096 + 256 * (len(self.layout.placements) + len(self.kept))
        return self.layout.file_bytes + side + record + self._beside_bytes

    @property
    def _beside_bytes(self) -> int:
        """Upper estimate of what lies in ranks' folders beside the weights, certificates at 400 bytes a tensor."""
        if self.run.layout is Layout.DEEPSEEK:
            return 0
        config = len(self.source.config_bytes) * self.run.grid.ranks
        certificates = 400 * sum(len(file.entries) for file in self.layout.files)
        return sum(map(len, files_beside(self.layout).values())) + config + certificates

    @cached_property
    def kept(self) -> list[str]:
        """Files without weights that the extra file keeps."""
        return kept_files(self.source)

    def peak_memory_bytes(self, workers: int) -> int:
        """Upper estimate of resident memory: the process, both sides' headers, and every worker's buffers."""
        layouts = [self.layout]
        if isinstance(self.source.files, WholeFiles):  # ranks of its own, and buffers to put their pieces together
            layouts.append(self.source.files.folder.layout)
        entries = self.tensors + sum(len(file.entries) for layout in layouts for file in layout.files)
        buffers = sum(_widest_piece_memory_bytes(layout) for layout in layouts)
        return BASE_MEMORY_BYTES + _ENTRY_MEMORY_BYTES * entries + workers * buffers

    def fingerprints(self) -> dict[str, str]:
        """What every file that is read looks like."""
        names = [*self.layout.placements, *self.kept]
        return {name: self.source.files.fingerprint(name) for name in sorted(names)}

    @cached_property
    def digest(self) -> str:
        """Identity of this plan."""
        headers = [[file.name, hashlib.sha256(file.header).hexdigest()] for file in self.layout.files]
        parts = {"version": v4quant.__version__, "run": self.run.id, "headers": headers, "side_files": self.side_files}
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _widest_piece_memory_bytes(layout: ShardedLayout) -> int:
    """Bytes of one worker's buffers for any tensor."""
    return max((piece_memory_bytes(place) for places in layout.placements.values() for place in places), default=0)


@dataclass(frozen=True)
class ShardReport:
    """What a sharding did.

    Attributes:
        rounded: wo_a tensors that BF16 does not hold exactly; the extra file has them as they were.
        resumed_files: source files that an earlier, interrupted run had done.
    """

    rounded: int
    resumed_files: int


def plan_shard(
    source: Checkpoint,
    grid: Grid,
    layout: Layout = Layout.DEEPSEEK,
    *,
    fp8_experts: bool = False,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    packing: Packing = Packing.LAYER,
) -> ShardPlan:
    """Plan the sharding of a sound checkpoint.

    Args:
        source: the checkpoint.
        grid: the ranks.
        layout: how they lie on disk.
        fp8_experts: cast FP4 experts to FP8; in DeepSeek's layout alone.
        max_shard_bytes: payload limit of a file in ranks' folders.
        packing: how tensors are packed into files in ranks' folders.

    Raises:
        CheckpointError: if the source has problems.
        UsageError: if this grid does not work, or the experts cannot become FP8.
    """
    source.require_sound()
    require_side_files_fit(source)
    _require_names_fit(source, grid, layout)
    _require_works(source, grid, layout)
    if fp8_experts and source.scheme.expert == BF16:
        raise UsageError(
            f"{source.where}: --experts fp8 is for FP4 experts, found BF16",
            hint=f"Convert it first: v4quant convert {source.where} OUT --to fp8",
        )
    fp8_experts = fp8_experts and source.scheme.expert == FP4
    limit = max_shard_bytes if layout is Layout.RANKS else 0
    run = Run(grid, layout, _sample(source), fp8_experts, limit, packing)
    kept = {name: source.files.size(name) for name in kept_files(source)}
    return ShardPlan(source, lay_out_ranks(_source_files(source), kept, run), side_files(source))


def _require_names_fit(source: Checkpoint, grid: Grid, layout: Layout) -> None:
    """Find out before hours of work which names `merge` would refuse, or would lie where a rank does."""
    require_sound_names(
        source.where,
        source.header_sha256,
        kept_files(source),
        hint="Rename this file in the checkpoint, then shard it.",
    )
    ranks = {rank_folder(rank) for rank in range(grid.ranks)} if layout is Layout.RANKS else set()
    for name in side_files(source):
        if name.partition("/")[0] in ranks:
            raise CheckpointError(
                f"{source.where}/{name}: is or lies where the folder of a rank will be, expected another name",
                hint="Rename it, then shard the checkpoint.",
            )


def _require_works(source: Checkpoint, grid: Grid, layout: Layout) -> None:
    found = obstacles(source, grid, layout)
    if not found:
        return
    others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    asked = f"--tp {grid.tp}" if layout is Layout.DEEPSEEK else str(grid)
    rest = "" if layout is Layout.DEEPSEEK else f" --ep {grid.ep} --pp {grid.pp}"
    working = ", ".join(map(str, working_shares(source, grid, layout))) or "none"
    raise UsageError(
        f"{source.where}: {asked} does not work: {found[0]}{others}",
        hint=f"These work{rest and f' as --tp with{rest}'}, up to {MOST_RANKS_LISTED}: {working}. See why with: "
        f"v4quant shard {source.where} OUT{rest} --explain",
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


def _sample(source: Checkpoint) -> str:
    """What tells this checkpoint from others of the same shapes: headers, and the ends of each file's data."""
    digest = hashlib.sha256(source.source_id().encode())
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
        CheckFailedError: if an expert's values would change as FP8, or a sharded source does not hold what it says.
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
        if journal.finished or any(is_there(out / file.name, file.file_bytes) for file in plan.layout.files):
            journal.close()
        else:
            remove_partial_files(out)
            forget(journal, out)
    return report


def _resume(plan: ShardPlan, out: Path, journal: Journal) -> None:
    """Go on with an earlier run's files; if one of them is gone or cut, what went into it is not finished."""
    sizes = {file.name: file.file_bytes for file in plan.layout.files}
    whole = {
        name for name, size in sizes.items() if is_there(out / name, size) or is_there(partial_path(out / name), size)
    }
    lost = {source for source, files in files_of(plan.layout).items() if not files <= whole}
    # Durably: a file that is begun anew has its full size long before it has the bytes that are finished otherwise.
    journal.strike(lost)
    journal.finished &= plan.layout.placements.keys()
    require_disk_space(out, plan.disk_bytes - sum(sizes[name] for name in whole))


def _write_ranks(
    plan: ShardPlan, out: Path, journal: Journal, workers: int, progress: Callable[[int], Advance] | None
) -> None:
    """Write what is not in the output files yet, and give them their names when all of it is."""
    places = plan.layout.placements
    todo = [name for name in places if name not in journal.finished]
    left = sum(place.source.bytes for name in todo for place in places[name])
    advance = progress(plan.bytes_read - left) if progress else None
    outputs = Outputs(out, plan.layout, journal.finished)

    def work(name: str, worker: Worker) -> list[FileRecord | ShareRecord]:
        return _scatter_file(plan, name, outputs, worker)

    def finish(name: str, records: list[FileRecord | ShareRecord]) -> None:
        outputs.sync(name)
        journal.append(name, records)
        outputs.finish(name)

    try:
        work_through(todo, work, finish, workers=workers, advance=advance)
        if todo or not outputs.is_named(plan.layout.extra.name):
            _write_kept(plan, outputs)
        outputs.finish_all()
    finally:
        outputs.leave()


def _scatter_file(plan: ShardPlan, name: str, outputs: Outputs, worker: Worker) -> list[FileRecord | ShareRecord]:
    """Read a source file from front to back: its header into the extra file, its tensors to where they belong."""
    files = plan.source.files
    hashes = FileHash() if plan.run.layout is Layout.DEEPSEEK else TensorHashes()
    kept = plan.layout.extra.entries[HEADER_PREFIX + name]
    header = files.read(name, 0, kept.bytes)
    hashes.file.update(header)
    outputs[kept.file].write(header, kept.start)
    rounded, shares = 0, list[ShareRecord]()
    for place in plan.layout.placements[name]:
        if isinstance(hashes, TensorHashes):
            hashes.begin()
        rounded += scatter(files, place, outputs, worker, hashes) > 0
        if isinstance(hashes, TensorHashes):
            shares += hashes.records(place)
    files.require_unchanged(name)
    digest = hashes.file.hexdigest()
    _require_noted(plan.source, name, digest)
    return [FileRecord(name, files.size(name), digest, rounded), *shares]


def _require_noted(source: Checkpoint, name: str, digest: str) -> None:
    """Check the hash of a file that a sharded source promised.

    Raises:
        CheckFailedError: if it is another.
    """
    noted = source.files.noted_sha256(name)
    if noted not in (None, digest):
        raise CheckFailedError(
            f"{name}: comes out of {source.where} with sha256 {digest[:16]}..., expected {noted[:16]}... as "
            f"{SHARDS_NAME} says of the original",
            hint="A rank file or the extra file was damaged; copy it again, or shard the checkpoint again.",
        )


def _write_kept(plan: ShardPlan, outputs: Outputs) -> None:
    """The files without weights, into the extra file; they are small, and written anew by each run."""
    for name in plan.kept:
        entry = plan.layout.extra.entries[FILE_PREFIX + name]
        for start in range(0, entry.bytes, CHUNK_BYTES):
            data = plan.source.files.read(name, start, min(start + CHUNK_BYTES, entry.bytes))
            outputs[entry.file].write(data, entry.start + start)


def _complete(plan: ShardPlan, out: Path, journal: Journal, resumed: int) -> ShardReport:
    """Copy the side files, write what lies beside the ranks' weights and v4quant.shards.json; forget the journal."""
    after = FORMATS["fp8" if plan.run.fp8_experts else plan.source.scheme.name]
    write_side_files(plan.source, None, after, plan.side_files, out)
    if plan.run.layout is Layout.RANKS:
        _write_beside(plan, out, journal)
    weights = _journalled(plan, journal)
    kept = {name: _hashed(plan.source, name) for name in plan.kept}
    for name, file in kept.items():
        _require_noted(plan.source, name, file.sha256)
    record = ShardsRecord(plan.run, weights, kept)
    remove_partial_files(out)
    write_file(out / SHARDS_NAME, [record.to_bytes(v4quant.__version__)])
    journal.remove()
    return ShardReport(sum(r.rounded for r in weights.values()), resumed)


def _journalled(plan: ShardPlan, journal: Journal) -> dict[str, FileRecord]:
    """What the journal says of the weight files; each of them must be in it.

    Raises:
        OutputError: if one is not: a sharded folder that does not list a file would have lost it.
    """
    lines = (line for line in journal.objects() if isinstance(line, dict) and "file" in line)
    weights = {r.file: r for r in (FileRecord.from_json(line, str(journal.path)) for line in lines)}
    if {name: record.bytes for name, record in weights.items()} != {
        name: plan.source.files.size(name) for name in plan.layout.placements
    }:
        raise OutputError(
            f"{journal.path}: has lines for {len(weights):,} files, expected those of the checkpoint's "
            f"{len(plan.layout.placements):,}",
            hint="The journal was edited or damaged; remove the folder and shard again.",
        )
    return weights


def _write_beside(plan: ShardPlan, out: Path, journal: Journal) -> None:
    """Certificate, index, config and v4quant.shards.json of every rank."""
    write_rank_certificates(plan.source, plan.layout, journal, out)
    for name, data in files_beside(plan.layout).items():
        write_file(out / name, [data])
    for rank in range(plan.run.grid.ranks):
        write_file(out / rank_folder(rank) / CONFIG_NAME, [plan.source.config_bytes])


def _hashed(source: Checkpoint, name: str) -> FileRecord:
    digest, size = hashlib.sha256(), source.files.size(name)
    for start in range(0, size, CHUNK_BYTES):
        digest.update(source.files.read(name, start, min(start + CHUNK_BYTES, size)))
    return FileRecord(name, size, digest.hexdigest())
