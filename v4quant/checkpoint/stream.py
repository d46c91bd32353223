"""Carry out one operation of a plan: read a band of rows, cast it, write it, hash all of it.

Memory is one band's buffers whatever the tensor (plan.chunk_rows), and they are reused from tensor to tensor.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from v4quant.checkpoint.certificate import TensorRecord, Verdict
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.plan import CHUNK_BYTES, Operation, Plan, chunk_rows
from v4quant.checkpoint.reader import Checkpoint
from v4quant.encodings import Encoding
from v4quant.errors import CheckpointError
from v4quant.formats.cast import Scratch, Weight, cast, check_finite, codes_dtype, decode, scale_dtype, tiles
from v4quant.numerics.casts import FP4_TO_FP8_SPREAD_BOUND, CastCheck
from v4quant.numerics.errors import NonFiniteError
from v4quant.numerics.measure import RoundingMeter

Advance = Callable[[int], None]


class Writable(Protocol):
    """A file, or what stands for it, that takes bytes at an absolute offset, from any thread."""

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes."""


class StoppedError(Exception):
    """The run is ending (interrupt, or an error elsewhere); this operation gave up between two bands."""


@dataclass
class Worker:
    """What one thread needs to carry out operations; nothing in it is shared but the stop event.

    Attributes:
        stop: set when the run ends early.
        advance: told how many source bytes were done.
        scratch: the thread's buffers.
    """

    stop: threading.Event
    advance: Advance
    scratch: Scratch

    def step(self, count: int) -> None:
        """Report progress; a negative count takes some back.

        Raises:
            StoppedError: if the run is ending.
        """
        self.advance(count)
        if self.stop.is_set():
            raise StoppedError


@dataclass(frozen=True)
class Band:
    """Rows [start, stop) of a weight matrix, and the rows of its scale that belong to them."""

    start: int
    stop: int
    columns: int

    def shape(self) -> tuple[int, int]:
        """Logical shape of the band."""
        return (self.stop - self.start, self.columns)

    def code_range(self, encoding: Encoding) -> tuple[int, int]:
        """Byte range of the band's codes within the weight tensor."""
        row = self.columns * codes_dtype(encoding).itemsize // encoding.values_a_byte
        return (self.start * row, self.stop * row)

    def scale_range(self, encoding: Encoding) -> tuple[int, int]:
        """Byte range of the band's scales within the scale tensor; empty where there is none."""
        if encoding.block is None:
            return (0, 0)
        rows, columns = encoding.scale_shape(self.shape())
        row = columns * scale_dtype(encoding).itemsize
        first = self.start // encoding.block.rows
        return (first * row, (first + rows) * row)


def bands(shape: tuple[int, ...]) -> Iterator[Band]:
    """Cut a logical [out, in] matrix into bands of whole 128-row blocks."""
    rows = chunk_rows(shape)
    for start in range(0, shape[0], rows):
        yield Band(start, min(start + rows, shape[0]), shape[1])


class _TensorReader:
    """Reads and hashes one stored tensor from front to back."""

    def __init__(self, checkpoint: Checkpoint, entry: TensorEntry) -> None:
        self.entry = entry
        self._files = checkpoint.files
        self._hash = hashlib.sha256()

    def read(self, start: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `start` of the tensor."""
        self._files.read_into(self.entry.file, self.entry.start + start, buffer)
        self._hash.update(buffer)

    def digest(self) -> str:
        return self._hash.hexdigest()


class _TensorWriter:
    """Writes and hashes one output tensor from front to back; a copy has the hash of what it was read from."""

    def __init__(self, shard: Writable, entry: TensorEntry, copied: _TensorReader | None = None) -> None:
        self.entry = entry
        self._shard = shard
        self._offset = entry.start
        self._hash = hashlib.sha256()
        self._copied = copied

    def write(self, data: memoryview) -> None:
        if self._copied is None:
            self._hash.update(data)
        self._shard.write(data, self._offset)
        self._offset += len(data)

    def digest(self) -> str:
        assert self._offset == self.entry.stop, f"{self.entry.name} is written in full"
        return self._hash.hexdigest() if self._copied is None else self._copied.digest()


def convert_tensor(plan: Plan, operation: Operation, shard: Writable, worker: Worker) -> list[TensorRecord]:
    """Convert one tensor, or one weight with its scale.

    Args:
        shard: where to write.

    Returns:
        The certificate's lines for the output tensors.

    Raises:
        CheckpointError: if a weight or scale is NaN or infinite, with its coordinate; if the source cannot be read.
        OutputError: if the disk refuses.
        StoppedError: if the run is ending.
    """
    if operation.source_encoding is None:
        return _copy_bytes(plan, operation, shard, worker)
    records = _convert_weight(plan, operation, shard, worker, meter=None)
    if records is None:
        # Rounding is rare, so it costs a second pass over its tensor rather than a measurement of every exact one.
        records = _convert_weight(plan, operation, shard, worker, meter=RoundingMeter())
    assert records is not None
    return records


def _copy_bytes(plan: Plan, operation: Operation, shard: Writable, worker: Worker) -> list[TensorRecord]:
    """Pass a tensor through bit for bit."""
    reader = _TensorReader(plan.source, operation.source[0])
    writer = _TensorWriter(shard, operation.target[0], copied=reader)
    size = reader.entry.stop - reader.entry.start
    buffer = worker.scratch.take("source codes", min(size, CHUNK_BYTES)).data
    for start in range(0, size, CHUNK_BYTES):
        view = buffer[: min(CHUNK_BYTES, size - start)]
        reader.read(start, view)
        writer.write(view)
        worker.step(len(view))
    return [_record(writer, Verdict.BIT_IDENTICAL, [reader])]


def _convert_weight(
    plan: Plan, operation: Operation, shard: Writable, worker: Worker, meter: RoundingMeter | None
) -> list[TensorRecord] | None:
    """Convert a weight band by band; None as soon as a value changed and there is no meter to measure by how much."""
    before, after = operation.source_encoding, operation.target_encoding
    assert before is not None and after is not None
    readers = [_TensorReader(plan.source, entry) for entry in operation.source]
    copied = readers if operation.is_copy else [None] * len(operation.target)
    writers = [_TensorWriter(shard, entry, reader) for entry, reader in zip(operation.target, copied, strict=True)]
    check = CastCheck()
    done = 0
    for band in bands(before.logical_shape(operation.source[0].shape)):
        source = _read_band(readers, band, worker.scratch.weight("source", before, band.shape()))
        with _coordinates(operation, band):
            if operation.is_copy:
                check_finite(source)
                target = source
            else:
                target = worker.scratch.weight("target", after, band.shape())
                like = _read_like(plan, operation, after, band)
                check = check.merged(cast(source, target, worker.scratch, like))
        if meter is not None:
            for of_source, of_target in tiles(source, target):
                meter.add(decode(of_source), decode(of_target))
        elif check.inexact:
            worker.step(-done)
            return None
        for writer, part in zip(writers, target.parts(), strict=True):
            writer.write(part.view(np.uint8).reshape(-1).data)
        step = sum(part.nbytes for part in source.parts())
        worker.step(step)
        done += step
    return _weight_records(operation, readers, writers, check, meter)


def _read_band(readers: list[_TensorReader], band: Band, weight: Weight) -> Weight:
    """Fill the arrays of `weight` with the band's rows."""
    ranges = [band.code_range(weight.encoding), band.scale_range(weight.encoding)]
    for reader, part, (start, _) in zip(readers, weight.parts(), ranges, strict=False):
        reader.read(start, part.view(np.uint8).reshape(-1).data)
    return weight


def _read_like(plan: Plan, operation: Operation, after: Encoding, band: Band) -> npt.NDArray[np.generic] | None:
    """The original's scales of this band, under --like."""
    if operation.like is None or plan.like is None:
        return None
    start, stop = band.scale_range(after)
    first = operation.like.start
    data = plan.like.files.read(operation.like.file, first + start, first + stop)
    return np.frombuffer(data, scale_dtype(after)).reshape(after.scale_shape(band.shape()))


@contextmanager
def _coordinates(operation: Operation, band: Band) -> Iterator[None]:
    """Name the tensor and the coordinate in it of a number that is not finite.

    Raises:
        CheckpointError: in place of a NonFiniteError, whose coordinate counts from the band's first row.
    """
    try:
        yield
    except NonFiniteError as error:
        entry = operation.source[1 if error.in_scale else 0]
        block = operation.source_encoding.block if operation.source_encoding and error.in_scale else None
        row = error.row + (band.start // block.rows if block else band.start)
        raise CheckpointError(
            f"{entry.file}: {entry.name}[{row}, {error.column}] is {error.found}, expected a finite number",
            hint="The weights are damaged; download or export them again.",
        ) from error


def _weight_records(
    operation: Operation,
    readers: list[_TensorReader],
    writers: list[_TensorWriter],
    check: CastCheck,
    meter: RoundingMeter | None,
) -> list[TensorRecord]:
    """The certificate's lines of a weight and its scale, with one verdict."""
    if operation.is_copy:
        return [
            _record(writer, Verdict.BIT_IDENTICAL, [reader]) for reader, writer in zip(readers, writers, strict=True)
        ]
    measured: dict[str, float] = {"negative_zeros_lost": check.negative_zeros_lost}
    if check.worst_spread is not None:
        measured |= {"worst_spread_log2": check.worst_spread, "spread_bound_log2": FP4_TO_FP8_SPREAD_BOUND}
    if meter is None:
        return [_record(writer, Verdict.VALUE_EXACT, readers, measured) for writer in writers]
    error = meter.result()
    measured |= {
        "changed_share": error.changed_share,
        "max_relative_error": error.max_relative,
        "rms_relative_error": error.rms_relative,
    }
    if math.isfinite(error.sqnr_db):  # infinite, which JSON cannot write, where only signs of zero were lost
        measured["sqnr_db"] = error.sqnr_db
    return [_record(writer, Verdict.ROUNDED, readers, measured) for writer in writers]


def _record(
    writer: _TensorWriter, verdict: Verdict, readers: list[_TensorReader], measured: dict[str, float] | None = None
) -> TensorRecord:
    entry = writer.entry
    sources = {reader.entry.name: reader.digest() for reader in readers}
    return TensorRecord(entry.name, entry.dtype, entry.shape, writer.digest(), verdict, sources, measured or {})
