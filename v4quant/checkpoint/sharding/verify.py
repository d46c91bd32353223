"""Verify a sharded folder: every byte of every rank, copies and recoded weights included.

The checkpoint is put together as `merge` would, and taken apart again as `shard` would, but instead of being written
the pieces are compared with what the ranks hold. So a copy that differs from others is found, and a wo_a in BF16 that
is not its FP8 codes times their scales. What comes out is hashed and compared with what `shard` noted of the original,
and ranks' certificates are held against the hashes of their shares. With a source, its values are compared as well.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from v4quant import strict_json
from v4quant.checkpoint.certificate import CERTIFICATE_NAME, TensorRecord, Verdict, read_certificate
from v4quant.checkpoint.files import Files, Source
from v4quant.checkpoint.plan import CHUNK_BYTES, DEFAULT_WORKERS
from v4quant.checkpoint.reader import SHARDS_NAME, Checkpoint
from v4quant.checkpoint.sharding.certificates import rank_certificate_header
from v4quant.checkpoint.sharding.folder import ShardedFolder, mark_of
from v4quant.checkpoint.sharding.hashes import TensorHashes
from v4quant.checkpoint.sharding.layout import Placement
from v4quant.checkpoint.sharding.rank_files import HEADER_PREFIX, RANK_KEY, RANKS_KEY, RUN_KEY, rank_folder
from v4quant.checkpoint.sharding.rank_folder import wrong_keys
from v4quant.checkpoint.sharding.record import MAX_RECORD_BYTES
from v4quant.checkpoint.sharding.rules import Layout
from v4quant.checkpoint.sharding.stream import Output, scatter
from v4quant.checkpoint.sharding.units import Advance, work_through
from v4quant.checkpoint.stream import Worker
from v4quant.checkpoint.verify import verify_against, verify_hashes
from v4quant.checkpoint.verify_report import Mismatch, VerifyReport
from v4quant.errors import CheckFailedError, CheckpointError
from v4quant.formats.cast import Scratch
from v4quant.numerics.errors import NonFiniteError


def verify_sharded(
    whole: Checkpoint,
    folder: ShardedFolder,
    source: Checkpoint | None,
    *,
    workers: int = DEFAULT_WORKERS,
    progress: Advance,
) -> VerifyReport:
    """Check that ranks hold what they should, and with a source that it is its values.

    Args:
        whole: the checkpoint, read from the sharded folder.
        folder: the sharded folder.
        source: what it must hold the values of; sound.
        progress: told bytes of the checkpoint that were checked, and of which file: twice all of them with a source.

    Raises:
        CheckpointError: if the source has problems, or a file cannot be read.
    """
    found = _Consistency(folder, whole).check(workers, progress)
    if source is None:
        report = VerifyReport()
        wrong = {mismatch.tensor for mismatch in found}
        sound = [name for name, entry in whole.tensors.items() if not {name, entry.file} & wrong]
        report.verdicts[Verdict.BIT_IDENTICAL] = len(sound)
    else:
        report = verify_against(whole, source, workers=workers, progress=progress)
    named = {mismatch.tensor for mismatch in report.mismatches}
    named |= {whole.tensors[name].file for name in named if name in whole.tensors}  # one of its tensors says more
    report.mismatches += [mismatch for mismatch in found if mismatch.tensor not in named]
    return report


def is_rank_folder(files: Files) -> bool:
    """True for the folder of one rank."""
    if SHARDS_NAME not in files or files.size(SHARDS_NAME) > MAX_RECORD_BYTES:
        return False
    told = _parsed_record(files)
    return isinstance(told, dict) and "rank" in told


def verify_rank(part: Checkpoint, *, workers: int = DEFAULT_WORKERS, progress: Advance) -> VerifyReport:
    """Check the folder of one rank: every tensor against its certificate, and what its record says against its files.

    Args:
        part: the folder, opened as a part.
        progress: told bytes hashed, and of which file.

    Raises:
        CheckpointError: if there is no certificate, or a file cannot be read.
    """
    report = verify_hashes(part, workers=workers, progress=progress)
    told = _parsed_record(part.files)
    wrong = wrong_keys(told, part.tensors)
    if wrong:
        report.mismatches.append(Mismatch(SHARDS_NAME, f"says of {', '.join(wrong)} what is not so"))
    elif isinstance(told, dict):
        expected = {key: str(told[of]) for key, of in ((RUN_KEY, "run"), (RANK_KEY, "rank"), (RANKS_KEY, "ranks"))}
        report.mismatches += [
            Mismatch(name, f"is not of the rank and the run that {SHARDS_NAME} tells of")
            for name in sorted(part.header_sha256)
            if mark_of(part.files, name) != expected
        ]
    return report


def _parsed_record(files: Source) -> object:
    """A rank's v4quant.shards.json; None where it is no JSON."""
    with contextlib.suppress(ValueError):
        return strict_json.parse(files.read(SHARDS_NAME))
    return None


@dataclass
class _Difference:
    """Where a rank does not hold what it should: the first byte of a tensor that differs, in which file."""

    file: str
    offset: int


@dataclass
class _Compared:
    """A file that is compared instead of written; see stream.Output."""

    files: Files
    name: str
    found: list[_Difference]
    scratch: Scratch

    def write(self, data: memoryview, offset: int) -> None:
        held = self.scratch.take("held", len(data))  # one buffer, however many ranks hold a copy
        self.files.read_into(self.name, offset, held.data)
        differs = held != np.frombuffer(data, np.uint8)
        if differs.any():
            self.found.append(_Difference(self.name, offset + int(differs.argmax())))


@dataclass
class _ComparedFiles:
    """The files of a folder, compared instead of written; see stream.Outputs."""

    files: Files
    scratch: Scratch = field(default_factory=Scratch)
    found: list[_Difference] = field(default_factory=list)

    def __getitem__(self, name: str) -> Output:
        return _Compared(self.files, name, self.found, self.scratch)


class _Consistency:
    """Takes the checkpoint apart again, and compares."""

    def __init__(self, folder: ShardedFolder, whole: Checkpoint) -> None:
        self._folder = folder
        self._whole = whole
        self._mismatches: list[Mismatch] = []
        self._shares: dict[str, list[TensorRecord]] = {}  # tensor -> certificate line of each share

    def check(self, workers: int, progress: Advance) -> list[Mismatch]:
        """Everything that is not as it should be."""

        def finish(_name: str, found: list[Mismatch]) -> None:
            self._mismatches += found

        names = list(self._folder.layout.placements)
        work_through(names, self._check_file, finish, workers=workers, advance=progress)
        if self._folder.layout.run.layout is Layout.RANKS:
            self._mismatches += self._check_certificates()
        self._mismatches += self._check_kept_files()
        return self._mismatches

    def _check_file(self, name: str, worker: Worker) -> list[Mismatch]:
        """One file of the checkpoint."""
        found: list[Mismatch] = []
        hashes, layout = TensorHashes(), self._folder.layout
        header = layout.extra.entries[HEADER_PREFIX + name]
        hashes.file.update(self._folder.files.read(header.file, header.start, header.stop))
        for place in layout.placements[name]:
            hashes.begin()
            compared = _ComparedFiles(self._folder.files)
            try:
                scatter(self._whole.files, place, compared, worker, hashes)
            except (CheckpointError, CheckFailedError) as error:
                if not isinstance(error.__cause__, NonFiniteError | None):
                    raise  # it could not be read, which says nothing about what it holds
                found.append(Mismatch(place.source.name, str(error)))
            else:
                self._shares[place.source.name] = [share.record for share in hashes.records(place)]
                found += [self._describe(place, difference) for difference in compared.found[:1]]
        if not found and hashes.file.hexdigest() != self._folder.record.weights[name].sha256:
            what = f"does not come out of the ranks as it went in: its sha256 is another than {SHARDS_NAME} says"
            found.append(Mismatch(name, what))
        return found

    def _describe(self, place: Placement, difference: _Difference) -> Mismatch:
        recoding, file = place.recoding, difference.file
        parts = [part for copies in place.shares for part in copies]
        parts += [recoding.scale_part] if recoding is not None and recoding.scale_part is not None else []
        part = next(part for part in parts if part.file == file and part.start <= difference.offset < part.stop)
        where = f"byte {difference.offset - part.start:,} of {'it' if part.name == place.source.name else part.name}"
        if recoding is not None:
            what = f"in {file} is not {recoding.before.name} codes times scale, first in {where}"
        else:
            what = f"in {file} differs from the copy in another rank, first in {where}"
        return Mismatch(place.source.name, what, {"file": file})

    def _check_kept_files(self) -> Iterator[Mismatch]:
        for name, record in self._folder.record.files.items():
            digest = hashlib.sha256()
            for start in range(0, record.bytes, CHUNK_BYTES):
                digest.update(self._whole.files.read(name, start, min(start + CHUNK_BYTES, record.bytes)))
            if digest.hexdigest() != record.sha256:
                yield Mismatch(name, f"in the extra file has another sha256 than {SHARDS_NAME} says")

    def _check_certificates(self) -> Iterator[Mismatch]:
        """Compare the ranks' certificates with those that `shard` would write of what the ranks hold."""
        layout, files = self._folder.layout, self._folder.files
        share_of = _share_numbers(layout.placements)
        damaged = {mismatch.tensor for mismatch in self._mismatches}  # their copies say more
        for rank in range(layout.grid.ranks):
            where = f"{rank_folder(rank)}/{CERTIFICATE_NAME}"
            held = layout.held_by(rank)
            if where not in files:
                yield Mismatch(where, "is missing, expected the certificate of this rank")
                continue
            header, records = read_certificate(files, where)
            expected = rank_certificate_header(self._whole, layout, rank)
            if replace(header, tool_version=expected.tool_version) != expected:
                yield Mismatch(where, "has another first line than the certificate of this rank")
            left = set(held)
            for record in records:
                entry = held.get(record.tensor)
                if entry is None:
                    yield Mismatch(record.tensor, f"has a line in {where}, and is not in this rank")
                elif record.tensor not in left:
                    yield Mismatch(record.tensor, f"has two lines in {where}")
                elif record.tensor in self._shares:
                    share = self._shares[record.tensor][share_of[record.tensor].get(entry.file, 0)]
                    if share.sha256 != record.sha256:
                        yield Mismatch(record.tensor, f"has another sha256 than {where} says", {"file": entry.file})
                    elif share != record and record.tensor not in damaged:
                        yield Mismatch(record.tensor, f"is not what its line in {where} says", {"file": entry.file})
                left.discard(record.tensor)
            if left:
                yield Mismatch(
                    min(left), f"has no line in {where}{f' (and {len(left) - 1} more)' if len(left) > 1 else ''}"
                )


def _share_numbers(placements: Mapping[str, list[Placement]]) -> dict[str, dict[str, int]]:
    """For each tensor the file of each copy, and which share it is."""
    return {
        place.source.name: {part.file: number for number, copies in enumerate(place.shares) for part in copies}
        for places in placements.values()
        for place in places
    }
