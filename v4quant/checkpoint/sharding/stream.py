"""Move one tensor between a checkpoint and its ranks in pieces.

`scatter` and `gather` are each other's inverse. Both pass over the tensor from front to back in the same pieces: some
bytes, some whole rows where columns are cut, a band of whole blocks where the ranks hold another encoding. Memory is
the buffers of one piece, whatever the tensor.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from v4quant.checkpoint.files import Source
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.plan import CHUNK_BYTES
from v4quant.checkpoint.sharding.layout import Copies, Placement, Recoding
from v4quant.checkpoint.sharding.rules import Split
from v4quant.checkpoint.stream import Band, Worker, bands
from v4quant.encodings import Encoding
from v4quant.errors import CheckFailedError, CheckpointError
from v4quant.formats.cast import Scratch, Weight, cast, codes_dtype, scale_dtype
from v4quant.numerics.errors import NonFiniteError

Bytes = npt.NDArray[np.uint8]


class Output(Protocol):
    """A file that is written at any offset; see ShardFile."""

    def write(self, data: memoryview, offset: int) -> None:
        """Write bytes at an absolute offset."""


class Outputs(Protocol):
    """Output files by name."""

    def __getitem__(self, name: str, /) -> Output:
        """The file of this name."""


class Watch(Protocol):
    """Sees the bytes of a tensor go by, each once and in order."""

    def whole(self, data: memoryview) -> None:
        """Of the tensor in the checkpoint."""

    def share(self, number: int, data: memoryview) -> None:
        """Of one of its shares, where it is cut and not recoded."""


def scatter(source: Source, place: Placement, outputs: Outputs, worker: Worker, watch: Watch) -> int:
    """Write a tensor of the checkpoint into the files that hold it.

    Args:
        source: the checkpoint's files.
        outputs: the output files, by name.
        watch: given the tensor's bytes, and those of its shares.

    Returns:
        Values that the ranks hold rounded: of a wo_a under F32 scales that are no powers of two, which the extra file
        holds as it was.

    Raises:
        CheckFailedError: if an expert's values change as FP8.
        CheckpointError: if a weight that is recoded is not finite; if the source cannot be read.
        OutputError: if the disk refuses.
        StoppedError: if the run is ending.
    """
    rounded = 0
    for start, stop, band in _pieces(place):
        piece = worker.scratch.take("piece", stop - start)
        source.read_into(place.source.file, place.source.start + start, piece.data)
        watch.whole(piece.data)
        if place.kept is not None:
            outputs[place.kept.file].write(piece.data, place.kept.start + start)
        if band is None or place.recoding is None:
            _write_shares(place, piece, start, outputs, worker.scratch, watch)
        else:
            rounded += _scatter_recoded(source, place, place.recoding, band, piece, outputs, worker.scratch)
        worker.step(stop - start)
    return rounded


def gather(ranks: Source, place: Placement, out: Output, worker: Worker, watch: Watch) -> None:
    """Write a tensor of the checkpoint as it was, from the files that hold it.

    Args:
        ranks: the sharded folder's files.
        out: the checkpoint's file.
        watch: given the bytes that are written.

    Raises:
        CheckpointError: if a weight that was recoded is not finite; if a rank cannot be read.
        OutputError: if the disk refuses.
        StoppedError: if the run is ending.
    """
    for start, stop, band in _pieces(place):
        piece = worker.scratch.take("piece", stop - start)
        _fill(ranks, place, start, band, piece, worker.scratch)
        watch.whole(piece.data)
        out.write(piece.data, place.source.start + start)
        worker.step(stop - start)


def read_range(ranks: Source, place: Placement, start: int, buffer: memoryview, scratch: Scratch) -> None:
    """Fill a buffer with the bytes from `start` on of a tensor of the checkpoint, from the files that hold it.

    Args:
        ranks: the sharded folder's files.
        start: counted from the tensor's first byte.

    Raises:
        CheckpointError: as gather.
    """
    stop = start + len(buffer)
    if place.kept is not None or (place.recoding is None and place.split is not Split.COLUMNS):
        _fill(ranks, place, start, None, np.frombuffer(buffer, np.uint8), scratch)
        return
    for first, last, band in _pieces(place):
        begin, end = max(first, start), min(last, stop)
        if begin < end:
            piece = scratch.take("piece", last - first)
            _fill(ranks, place, first, band, piece, scratch)
            buffer[begin - start : end - start] = piece[begin - first : end - first].data


def _fill(ranks: Source, place: Placement, start: int, band: Band | None, piece: Bytes, scratch: Scratch) -> None:
    """Fill a piece with the bytes from `start` on."""
    if place.kept is not None:
        ranks.read_into(place.kept.file, place.kept.start + start, piece.data)
    elif band is None or place.recoding is None:
        _read_shares(place, piece, start, ranks, scratch)
    else:
        _gather_recoded(ranks, place, place.recoding, band, piece, scratch)


def piece_memory_bytes(place: Placement) -> int:
    """Bytes of one worker's buffers for this tensor."""
    widest = max((stop - start for start, stop, _ in _first_piece(place)), default=0)
    if place.recoding is None:
        return 2 * widest
    return 8 * widest  # the codes, and another encoding by way of BF16


def _first_piece(place: Placement) -> Iterator[tuple[int, int, Band | None]]:
    for piece in _pieces(place):
        yield piece
        return


def _pieces(place: Placement) -> Iterator[tuple[int, int, Band | None]]:
    """Byte ranges of the source tensor, and the band of rows that each is where values are recoded."""
    entry = place.source
    if place.recoding is not None:
        before = place.recoding.before
        for band in bands(before.logical_shape(entry.shape)):
            yield (*band.code_range(before), band)
        return
    step = CHUNK_BYTES
    if place.split is Split.COLUMNS and entry.bytes:
        row_bytes = entry.bytes // entry.shape[0]
        step = max(1, CHUNK_BYTES // row_bytes) * row_bytes
    for start in range(0, entry.bytes, step):
        yield start, min(start + step, entry.bytes), None


def _write_shares(place: Placement, piece: Bytes, start: int, outputs: Outputs, scratch: Scratch, watch: Watch) -> None:
    """Write what each share has of the bytes from `start` on of a tensor, into every copy of it."""
    if place.split is Split.COLUMNS:
        for number, columns, first in _strips(place, piece, start):
            strip = scratch.take("strip", columns.size).reshape(columns.shape)
            strip[...] = columns
            _write_copies(place.shares[number], strip.reshape(-1).data, first, outputs)
            watch.share(number, strip.reshape(-1).data)
    else:
        for number, span, first in _spans(place.shares, piece.size, start):
            _write_copies(place.shares[number], piece[span].data, first, outputs)
            if len(place.shares) > 1:
                watch.share(number, piece[span].data)


def _write_copies(copies: Copies, data: memoryview, first: int, outputs: Outputs) -> None:
    for part in copies:
        outputs[part.file].write(data, part.start + first)


def _read_shares(place: Placement, piece: Bytes, start: int, ranks: Source, scratch: Scratch) -> None:
    """Fill a piece with the bytes from `start` on of a tensor, from the first copy of each share."""
    if place.split is Split.COLUMNS:
        for number, columns, first in _strips(place, piece, start):
            part = place.shares[number][0]
            strip = scratch.take("strip", columns.size)
            ranks.read_into(part.file, part.start + first, strip.data)
            columns[...] = strip.reshape(columns.shape)
    else:
        for number, span, first in _spans(place.shares, piece.size, start):
            part = place.shares[number][0]
            ranks.read_into(part.file, part.start + first, piece[span].data)


def _strips(place: Placement, piece: Bytes, start: int) -> Iterator[tuple[int, Bytes, int]]:
    """For each share its columns of these rows, and the byte of the share where they begin."""
    if not piece.size:
        return
    row_bytes = place.source.bytes // place.source.shape[0]
    rows, width = piece.reshape(-1, row_bytes), row_bytes // len(place.shares)
    for number in range(len(place.shares)):
        yield number, rows[:, number * width : (number + 1) * width], start // row_bytes * width


def _spans(shares: Sequence[Copies], size: int, start: int) -> Iterator[tuple[int, slice, int]]:
    """For each share its span of these bytes, and the byte of the share where it begins."""
    done = 0
    while shares and done < size:
        number, first = divmod(start + done, shares[0][0].bytes)
        count = min(size - done, shares[0][0].bytes - first)
        yield number, slice(done, done + count), first
        done += count


def _scatter_recoded(
    source: Source,
    place: Placement,
    recoding: Recoding,
    band: Band,
    piece: Bytes,
    outputs: Outputs,
    scratch: Scratch,
) -> int:
    """Write a band in the ranks' encoding; returns how many values changed, where that is allowed."""
    before, after = recoding.before, recoding.after
    stored = _weight(before, band, piece, source, recoding.scale, scratch)
    target = scratch.weight("target", after, band.shape())
    try:
        inexact = cast(stored, target, scratch).inexact
    except NonFiniteError as error:
        raise _not_finite(place, recoding, band, error) from error
    if inexact and recoding.scale_part is not None:
        raise CheckFailedError(
            f"{place.source.name}: {inexact:,} values would change as {after.name}, expected none",
            hint="Keep the experts as they are stored: leave --experts fp8 out.",
        )
    codes, (first, _) = target.codes.view(np.uint8).reshape(-1), band.code_range(after)
    for number, span, first_of_share in _spans(place.shares, codes.size, first):
        _write_copies(place.shares[number], codes[span].data, first_of_share, outputs)
    if recoding.scale_part is not None:
        part, (first, _) = recoding.scale_part, band.scale_range(after)
        outputs[part.file].write(target.scales.view(np.uint8).reshape(-1).data, part.start + first)
    return inexact


def _gather_recoded(
    ranks: Source, place: Placement, recoding: Recoding, band: Band, piece: Bytes, scratch: Scratch
) -> None:
    """Fill a piece with the codes that a band had under the scales that it had, which the extra file holds."""
    assert recoding.scale_part is not None, "without a scale in the rank the codes themselves are kept"
    ((part, *_),), after = place.shares, recoding.after
    start, stop = band.code_range(after)
    codes = scratch.take("rank codes", stop - start)
    ranks.read_into(part.file, part.start + start, codes.data)
    stored = _weight(after, band, codes, ranks, recoding.scale_part, scratch)
    target = scratch.weight("target", recoding.before, band.shape())
    like = _scale(recoding.before, band, ranks, recoding.scale_kept)
    try:
        cast(stored, target, scratch, like)  # that it was exact the file's hash will tell
    except NonFiniteError as error:
        raise CheckpointError(f"{part.file}: {part.name} holds {error.found}, expected finite numbers") from error
    piece[...] = target.codes.view(np.uint8).reshape(-1)


def _weight(
    encoding: Encoding, band: Band, codes: Bytes, files: Source, scale: TensorEntry, scratch: Scratch
) -> Weight:
    """A band of a stored matrix: codes that are read already, and its scales."""
    shaped = codes.view(codes_dtype(encoding)).reshape(encoding.storage_shape(band.shape()))
    buffer = scratch.array("scale", encoding.scale_shape(band.shape()), scale_dtype(encoding))
    buffer[...] = _scale(encoding, band, files, scale)
    return Weight(encoding, shaped, buffer)


def _scale(encoding: Encoding, band: Band, files: Source, scale: TensorEntry) -> npt.NDArray[np.generic]:
    """The scales of a band."""
    start, stop = band.scale_range(encoding)
    data = files.read(scale.file, scale.start + start, scale.start + stop)
    return np.frombuffer(data, scale_dtype(encoding)).reshape(encoding.scale_shape(band.shape()))


def _not_finite(place: Placement, recoding: Recoding, band: Band, error: NonFiniteError) -> CheckpointError:
    """Name the tensor and the coordinate in it; the error's counts from the band's first row."""
    entry = recoding.scale if error.in_scale else place.source
    block = recoding.before.block if error.in_scale else None
    row = error.row + (band.start // block.rows if block else band.start)
    return CheckpointError(
        f"{entry.file}: {entry.name}[{row}, {error.column}] is {error.found}, expected a finite number",
        hint="The weights are damaged; download or export them again.",
    )
