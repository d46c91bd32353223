"""`merge`: ranks back into the checkpoint that they were made from, byte for byte.

Each file of the checkpoint is written from front to back by one thread, hashed on the way, and gets its name only if
the hash is the one that `shard` noted when it read the original. config.json comes last. What comes out of ranks'
folders gets a certificate that says the same of every tensor, unless the original had one of its own.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import v4quant
from v4quant.checkpoint.certificate import CERTIFICATE_NAME
from v4quant.checkpoint.journal import Journal, JournalHeader
from v4quant.checkpoint.output import ShardFile, require_disk_space, write_file
from v4quant.checkpoint.plan import CHUNK_BYTES, DEFAULT_WORKERS
from v4quant.checkpoint.reader import SHARDS_NAME, open_source
from v4quant.checkpoint.run_folder import forget, is_there, open_run, remove_partial_files, require_apart
from v4quant.checkpoint.sharding.certificates import write_whole_certificate
from v4quant.checkpoint.sharding.folder import ShardedFolder
from v4quant.checkpoint.sharding.hashes import ShareRecord, TensorHashes
from v4quant.checkpoint.sharding.rank_files import FILE_PREFIX, HEADER_PREFIX
from v4quant.checkpoint.sharding.record import FileRecord, in_writing_order
from v4quant.checkpoint.sharding.rules import Layout
from v4quant.checkpoint.sharding.stream import gather
from v4quant.checkpoint.sharding.units import Advance, work_through
from v4quant.checkpoint.sharding.whole import WholeFiles
from v4quant.checkpoint.stream import Worker
from v4quant.errors import CheckFailedError, InterruptedRunError


@dataclass(frozen=True)
class MergePlan:
    """A merge, decided."""

    source: ShardedFolder

    @cached_property
    def tensors(self) -> int:
        """Tensors of the checkpoint."""
        return sum(map(len, self.source.layout.placements.values()))

    @cached_property
    def bytes_written(self) -> int:
        """Bytes of tensor data in the checkpoint."""
        return sum(place.source.bytes for places in self.source.layout.placements.values() for place in places)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all output files."""
        record = self.source.record
        return sum(file.bytes for file in (*record.weights.values(), *record.files.values()))

    @property
    def writes_certificate(self) -> bool:
        """True where the checkpoint gets a certificate that it did not have."""
        return self.source.layout.run.layout is Layout.RANKS and CERTIFICATE_NAME not in self.source.record.files

    def fingerprints(self) -> dict[str, str]:
        """What every file that is read looks like."""
        names = [SHARDS_NAME, *(file.name for file in self.source.layout.files)]
        return {name: self.source.files.fingerprint(name) for name in names}

    @property
    def digest(self) -> str:
        """Identity of this plan."""
        record = self.source.record
        files = [file.to_json() for file in (*record.weights.values(), *record.files.values())]
        return hashlib.sha256(json.dumps([v4quant.__version__, record.run.id, files]).encode()).hexdigest()


def apply_merge(
    plan: MergePlan,
    out: Path,
    *,
    workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    progress: Callable[[int], Advance] | None = None,
) -> int:
    """Merge as planned, or continue a run of the same plan that was interrupted.

    Args:
        out: folder to write; made if missing.
        workers: threads.
        overwrite: replace what out holds.
        progress: told the bytes that need not be written again; gives what is told bytes and file from then on.

    Returns:
        Weight files that an earlier, interrupted run had finished.

    Raises:
        CheckFailedError: if a file does not come out as the original was.
        CheckpointError: if the sharded folder changed or cannot be read.
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
        _write_weights(plan, out, journal, workers, progress)
        remove_partial_files(out)
        if plan.writes_certificate:
            write_whole_certificate(open_source(WholeFiles(plan.source)), journal, out)
        for name in in_writing_order(plan.source.record.files):
            write_file(out / name, _kept_file(plan.source, plan.source.record.files[name]))
        journal.remove()
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted: {len(journal.finished)} of {len(plan.source.layout.placements)} files are finished and kept",
            hint="Run the same command again to continue.",
        ) from None
    finally:
        remove_partial_files(out)
        if journal.finished or any(out.glob("*.safetensors")):
            journal.close()
        else:
            forget(journal, out)
    return resumed


def _resume(plan: MergePlan, out: Path, journal: Journal) -> None:
    """Go on with an earlier run's files, as far as they are there."""
    weights = plan.source.record.weights
    there = {name for name, file in weights.items() if is_there(out / name, file.bytes)}
    journal.finished &= there
    require_disk_space(out, plan.disk_bytes - sum(weights[name].bytes for name in there))


def _write_weights(
    plan: MergePlan, out: Path, journal: Journal, workers: int, progress: Callable[[int], Advance] | None
) -> None:
    places = plan.source.layout.placements
    todo = [name for name in places if name not in journal.finished]
    left = sum(place.source.bytes for name in todo for place in places[name])
    advance = progress(plan.bytes_written - left) if progress else None
    work_through(
        todo,
        lambda name, worker: _gather_file(plan.source, name, out, worker),
        lambda name, records: journal.append(name, records),
        workers=workers,
        advance=advance,
    )


def _gather_file(source: ShardedFolder, name: str, out: Path, worker: Worker) -> list[FileRecord | ShareRecord]:
    """Write a weight file from front to back, and give it its name if it is the original."""
    expected, hashes = source.record.weights[name], TensorHashes()
    kept = source.layout.extra.entries[HEADER_PREFIX + name]
    header = source.files.read(kept.file, kept.start, kept.stop)
    hashes.file.update(header)
    file = ShardFile(out / name, header, expected.bytes)
    tensors = []
    try:
        for place in source.layout.placements[name]:
            hashes.begin()
            gather(source.files, place, file, worker, hashes)
            tensors.append(hashes.whole_record(place))
        _require_original(source, expected, hashes.file.hexdigest())
        file.finish()
    except BaseException:
        file.abandon()
        raise
    return [expected, *tensors]


def _kept_file(source: ShardedFolder, expected: FileRecord) -> Iterator[bytes]:
    """The bytes of a file without weights; fails at its end where it is not the original."""
    entry, digest = source.layout.extra.entries[FILE_PREFIX + expected.file], hashlib.sha256()
    for start in range(entry.start, entry.stop, CHUNK_BYTES):
        data = source.files.read(entry.file, start, min(start + CHUNK_BYTES, entry.stop))
        digest.update(data)
        yield data
    _require_original(source, expected, digest.hexdigest())


def _require_original(source: ShardedFolder, expected: FileRecord, digest: str) -> None:
    if digest != expected.sha256:
        raise CheckFailedError(
            f"{expected.file}: comes out of {source.where} with sha256 {digest[:16]}..., expected "
            f"{expected.sha256[:16]}... as {SHARDS_NAME} says of the original",
            hint="A rank file or the extra file was damaged; copy it again, or shard the checkpoint again.",
        )
