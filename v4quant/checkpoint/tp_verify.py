"""Verify a sharded folder: every byte of every rank, copies and recoded weights included.

The checkpoint is put together as `merge` would, and taken apart again as `shard` would, but instead of being written
the pieces are compared with what the ranks hold. So a copy that differs from others is found, and a wo_a in BF16 that
is not its FP8 codes times their scales. What comes out is hashed and compared with what `shard` noted of the original,
and ranks' certificates are held against the hashes of their shares. With a source, its values are compared as well.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from v4quant.checkpoint.certificate import CERTIFICATE_NAME, Verdict, read_certificate
from v4quant.checkpoint.files import Files
from v4quant.checkpoint.plan import DEFAULT_WORKERS
from v4quant.checkpoint.reader import SHARDS_NAME, Checkpoint
from v4quant.checkpoint.stream import Worker
from v4quant.checkpoint.tp_files import EXTRA_NAME, HEADER_PREFIX, rank_folder
from v4quant.checkpoint.tp_folder import ShardedFolder
from v4quant.checkpoint.tp_hashes import TensorHashes
from v4quant.checkpoint.tp_layout import Placement
from v4quant.checkpoint.tp_rules import Layout
from v4quant.checkpoint.tp_stream import Output, scatter
from v4quant.checkpoint.units import Advance, work_through
from v4quant.checkpoint.verify import verify_against
from v4quant.checkpoint.verify_report import Mismatch, VerifyReport
from v4quant.config import CONFIG_NAME
from v4quant.errors import CheckFailedError, CheckpointError
from v4quant.formats.cast import Scratch


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
    return SHARDS_NAME in files and CONFIG_NAME in files and EXTRA_NAME not in files


@dataclass
class _Difference:
    """Where a rank does not hold what it should: the first byte of a tensor that differs, in which file."""

    file: str
    offset: int


@dataclass
class _Compared:
    """A file that is compared instead of written; see tp_stream.Output."""

    files: Files
    name: str
    found: list[_Difference]
    scratch: Scratch

    def write(self, data: memoryview, offset: int) -> None:
        held = self.scratch.take(f"held {self.name}", len(data))
        self.files.read_into(self.name, offset, held.data)
        differs = held != np.frombuffer(data, np.uint8)
        if differs.any():
            self.found.append(_Difference(self.name, offset + int(differs.argmax())))


@dataclass
class _ComparedFiles:
    """The files of a folder, compared instead of written; see tp_stream.Outputs."""

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
        self._shares: dict[str, list[str]] = {}  # tensor -> hash of each share

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
                found.append(Mismatch(place.source.name, str(error)))
            else:
                self._shares[place.source.name] = [share.record.sha256 for share in hashes.records(place)]
                found += [self._describe(place, difference) for difference in compared.found[:1]]
        if not found and hashes.file.hexdigest() != self._folder.record.weights[name].sha256:
            what = f"does not come out of the ranks as it went in: its sha256 is another than {SHARDS_NAME} says"
            found.append(Mismatch(name, what))
        return found

    def _describe(self, place: Placement, difference: _Difference) -> Mismatch:
        copies = [part for shares in place.shares for part in shares if part.file == difference.file]
        where = f"byte {difference.offset - copies[0].start:,} of it" if copies else f"byte {difference.offset:,}"
        if place.recoding is not None:
            what = f"in {difference.file} is not {place.recoding.before.name} codes times scale, first in {where}"
        else:
            what = f"in {difference.file} differs from the copy in another rank, first in {where}"
        return Mismatch(place.source.name, what, {"file": difference.file})

    def _check_kept_files(self) -> Iterator[Mismatch]:
        for name, record in self._folder.record.files.items():
            if hashlib.sha256(self._whole.files.read(name)).hexdigest() != record.sha256:
                yield Mismatch(name, f"in the extra file has another sha256 than {SHARDS_NAME} says")

    def _check_certificates(self) -> Iterator[Mismatch]:
        """Hold the ranks' certificates against the hashes of their shares."""
        layout, files = self._folder.layout, self._folder.files
        share_of = _share_numbers(layout.placements)
        for rank in range(layout.grid.ranks):
            where = f"{rank_folder(rank)}/{CERTIFICATE_NAME}"
            held = layout.held_by(rank)
            if where not in files:
                yield Mismatch(where, "is missing, expected the certificate of this rank")
                continue
            _, records = read_certificate(files, where)
            left = set(held)
            for record in records:
                left.discard(record.tensor)
                entry = held.get(record.tensor)
                if entry is None:
                    yield Mismatch(record.tensor, f"has a line in {where}, and is not in this rank")
                elif record.tensor in self._shares:
                    number = share_of[record.tensor].get(entry.file, 0)
                    if self._shares[record.tensor][number] != record.sha256:
                        yield Mismatch(record.tensor, f"has another sha256 than {where} says", {"file": entry.file})
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
