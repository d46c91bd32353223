"""Move one tensor between a checkpoint and its tensor-parallel files in pieces, and hash the checkpoint's bytes.

`scatter` and `gather` are each other's inverse. Both pass over the tensor from front to back in the same pieces: some
bytes, some whole rows where columns are cut, a band of whole blocks where the ranks hold another encoding. Memory is
the buffers of one piece, whatever the tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from v4quant.checkpoint.file_source import FileSource
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.output import ShardFile
from v4quant.checkpoint.plan import CHUNK_BYTES
from v4quant.checkpoint.stream import Band, Worker, bands
from v4quant.checkpoint.tp_layout import Placement, Recoding
from v4quant.checkpoint.tp_rules import Split
from v4quant.encodings import Encoding
from v4quant.errors import CheckFailedError, CheckpointError
from v4quant.formats.cast import Scratch, Weight, cast, codes_dtype, scale_dtype
from v4quant.numerics.errors import NonFiniteError

Bytes = npt.NDArray[np.uint8]


class Hash(Protocol):
    """What hashlib makes."""

    def update(self, data: memoryview, /) -> None:
        """Add bytes."""


def scatter(
    source: FileSource, place: Placement, outputs: Mapping[str, ShardFile], worker: Worker, digest: Hash
) -> int:
    """Write a tensor of the checkpoint into the files that hold it.

    Args:
        source: the checkpoint's files.
        outputs: the open output files, by name.
        digest: given the tensor's bytes in the checkpoint.

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
        digest.update(piece.data)
        if place.kept is not None:
            outputs[place.kept.file].write(piece.data, place.kept.start + start)
        if band is None or place.recoding is None:
            _write_parts(place.parts, place.split, place.source, piece, start, outputs, worker.scratch)
        else:
            rounded += _scatter_recoded(source, place, place.recoding, band, piece, outputs, worker.scratch)
        worker.step(stop - start)
    return rounded


def gather(ranks: FileSource, place: Placement, out: ShardFile, worker: Worker, digest: Hash) -> None:
    """Write a tensor of the checkpoint as it was, from the files that hold it.

    Args:
        ranks: the sharded folder's files.
        out: the checkpoint's file.
        digest: given the bytes that are written.

    Raises:
        CheckpointError: if a weight that was recoded is not finite; if a rank cannot be read.
        OutputError: if the disk refuses.
        StoppedError: if the run is ending.
    """
    for start, stop, band in _pieces(place):
        piece = worker.scratch.take("piece", stop - start)
        if place.kept is not None:
            ranks.read_into(place.kept.file, place.kept.start + start, piece.data)
        elif band is None or place.recoding is None:
            _read_parts(place.parts, place.split, place.source, piece, start, ranks, worker.scratch)
        else:
            _gather_recoded(ranks, place, place.recoding, band, piece, worker.scratch)
        digest.update(piece.data)
        out.write(piece.data, place.source.start + start)
        worker.step(stop - start)


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


def _write_parts(
    parts: Sequence[TensorEntry],
    split: Split,
    whole: TensorEntry,
    piece: Bytes,
    start: int,
    outputs: Mapping[str, ShardFile],
    scratch: Scratch,
) -> None:
    """Write what each part holds of the bytes from `start` on of a tensor."""
    if split is Split.COLUMNS:
        for part, columns, first in _strips(parts, whole, piece, start):
            strip = scratch.take("strip", columns.size).reshape(columns.shape)
            strip[...] = columns
            outputs[part.file].write(strip.reshape(-1).data, part.start + first)
    else:
        for part, span, first in _spans(parts, split, piece.size, start):
            outputs[part.file].write(piece[span].data, part.start + first)


def _read_parts(
    parts: Sequence[TensorEntry],
    split: Split,
    whole: TensorEntry,
    piece: Bytes,
    start: int,
    ranks: FileSource,
    scratch: Scratch,
) -> None:
    """Fill a piece with the bytes from `start` on of a tensor, from the parts that hold them."""
    if split is Split.COLUMNS:
        for part, columns, first in _strips(parts, whole, piece, start):
            strip = scratch.take("strip", columns.size)
            ranks.read_into(part.file, part.start + first, strip.data)
            columns[...] = strip.reshape(columns.shape)
    else:
        held = parts if split is Split.ROWS else parts[:1]  # of equal copies one is enough
        for part, span, first in _spans(held, split, piece.size, start):
            ranks.read_into(part.file, part.start + first, piece[span].data)


def _strips(
    parts: Sequence[TensorEntry], whole: TensorEntry, piece: Bytes, start: int
) -> Iterator[tuple[TensorEntry, Bytes, int]]:
    """For each part its columns of these rows, and the byte of the part where they begin."""
    if not piece.size:
        return
    row_bytes = whole.bytes // whole.shape[0]
    rows, width = piece.reshape(-1, row_bytes), row_bytes // len(parts)
    for number, part in enumerate(parts):
        yield part, rows[:, number * width : (number + 1) * width], start // row_bytes * width


def _spans(
    parts: Sequence[TensorEntry], split: Split, size: int, start: int
) -> Iterator[tuple[TensorEntry, slice, int]]:
    """For each part its span of these bytes, and the byte of the part where it begins."""
    if split is not Split.ROWS:
        yield from ((part, slice(0, size), start) for part in parts)
        return
    done = 0
    while done < size:
        number, first = divmod(start + done, parts[0].bytes)
        count = min(size - done, parts[0].bytes - first)
        yield parts[number], slice(done, done + count), first
        done += count


def _scatter_recoded(
    source: FileSource,
    place: Placement,
    recoding: Recoding,
    band: Band,
    piece: Bytes,
    outputs: Mapping[str, ShardFile],
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
    for part, span, place_in_part in _spans(place.parts, place.split, codes.size, first):
        outputs[part.file].write(codes[span].data, part.start + place_in_part)
    if recoding.scale_part is not None:
        part, (first, _) = recoding.scale_part, band.scale_range(after)
        outputs[part.file].write(target.scales.view(np.uint8).reshape(-1).data, part.start + first)
    return inexact


def _gather_recoded(
    ranks: FileSource, place: Placement, recoding: Recoding, band: Band, piece: Bytes, scratch: Scratch
) -> None:
    """Fill a piece with the codes that a band had under the scales that it had, which the extra file holds."""
    assert recoding.scale_part is not None, "without a scale in the rank the codes themselves are kept"
    (part,), after = place.parts, recoding.after
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
    encoding: Encoding, band: Band, codes: Bytes, files: FileSource, scale: TensorEntry, scratch: Scratch
) -> Weight:
    """A band of a stored matrix: codes that are read already, and its scales."""
    shaped = codes.view(codes_dtype(encoding)).reshape(encoding.storage_shape(band.shape()))
    buffer = scratch.array("scale", encoding.scale_shape(band.shape()), scale_dtype(encoding))
    buffer[...] = _scale(encoding, band, files, scale)
    return Weight(encoding, shaped, buffer)


def _scale(encoding: Encoding, band: Band, files: FileSource, scale: TensorEntry) -> npt.NDArray[np.generic]:
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
