"""Compare one tensor of two checkpoints by value, and say where they differ first and by how much.

Values are compared as bit patterns of their exact float32 (or float64) decoding: equal bits are equal values with equal
signs of zero. Bands of rows keep memory bounded.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from v4quant.checkpoint.certificate import TensorRecord
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.reader import Checkpoint
from v4quant.checkpoint.second_decoder import decode_scale, decode_weight, needs_float64, spread
from v4quant.inventory import LogicalTensor
from v4quant.names import scale_name

Advance = Callable[[int, str], None]
_BAND_VALUES = 2**18
_READ_BYTES = 4 * 2**20
# Certificates hold float64 measurements of the same numbers; only the order of sums differs.
_MEASUREMENT_TOLERANCE = 1e-6
# Rows and columns under one scale, by the header dtype of the codes: what the releases' shapes say.
_BLOCKS = {"I8": (1, 32), "F8_E4M3": (128, 128)}
_VALUES_A_BYTE = {"I8": 2.0, "F8_E4M3": 1.0, "BF16": 0.5}
_PLAIN_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
}


@dataclass(frozen=True)
class FirstDifference:
    """The first element that differs, in row order."""

    coordinate: tuple[int, ...]
    expected: float
    found: float

    def to_json(self) -> dict[str, Any]:
        """Coordinate and both values; what JSON cannot write (NaN, infinities) as text."""
        expected, found = (
            value if math.isfinite(value) else str(float(value)) for value in (self.expected, self.found)
        )
        return {"coordinate": list(self.coordinate), "expected": expected, "found": found}


@dataclass
class Comparison:
    """What the comparison of one tensor found.

    Attributes:
        unlike: why the two cannot be compared, if they cannot: a missing part, another shape.
        same_bytes: every stored byte is the same, scales included.
        first: the first value that differs; None where none does.
        elements, changed: values compared, and how many of them differ in value or in the sign of zero.
        max_relative: largest |found - expected| / |expected| over non-zero expected values.
        error_energy, signal_energy: sums of squares of found - expected, and of expected.
    """

    unlike: str = ""
    same_bytes: bool = True
    first: FirstDifference | None = None
    elements: int = 0
    changed: int = 0
    max_relative: float = 0.0
    error_energy: float = 0.0
    signal_energy: float = 0.0

    @property
    def rms_relative(self) -> float:
        """Frobenius norm of the error over that of the expected values."""
        if self.error_energy == 0:
            return 0.0
        return math.sqrt(self.error_energy / self.signal_energy) if self.signal_energy else math.inf

    def describe(self) -> str:
        """One line for people."""
        if self.unlike or self.first is None:
            return self.unlike
        at = list(self.first.coordinate)
        if math.isnan(self.max_relative):
            return (
                f"{self.changed:,} of {self.elements:,} values differ, first at {at}: found {self.first.found!r}, "
                f"expected {self.first.expected!r}"
            )
        return (
            f"{self.changed:,} of {self.elements:,} values differ, first at {at}: found {self.first.found!r}, "
            f"expected {self.first.expected!r}; relative error at most {self.max_relative:.3g}, "
            f"RMS {self.rms_relative:.3g}"
        )

    def is_within(self, record: TensorRecord) -> bool:
        """True if the error is no larger than a certificate's line of a rounded tensor says."""
        measured = record.measured
        found = {
            "changed_share": self.changed / max(1, self.elements),
            "max_relative_error": self.max_relative,
            "rms_relative_error": self.rms_relative,
        }
        return all(
            value <= measured.get(key, 0.0) * (1 + _MEASUREMENT_TOLERANCE) for key, value in found.items()
        ) and not math.isnan(self.max_relative)


def compare_plain(out: Checkpoint, source: Checkpoint, tensor: LogicalTensor, progress: Advance) -> Comparison:
    """Compare a tensor that no format quantises, byte for byte."""
    ours, theirs = out.tensors[tensor.name], source.tensors[tensor.name]
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return Comparison(unlike=f"is {ours.dtype} {list(ours.shape)}, expected {theirs.dtype} {list(theirs.shape)}")
    comparison = Comparison(elements=math.prod(ours.shape))
    for start in range(0, ours.bytes, _READ_BYTES):
        stop = min(start + _READ_BYTES, ours.bytes)
        found, expected = _read(out, ours, start, stop), _read(source, theirs, start, stop)
        if not torch.equal(found, expected):
            comparison.same_bytes = False
            _note_plain(comparison, found, expected, start, ours)
        progress(stop - start, ours.file)
    return comparison


def _note_plain(
    comparison: Comparison, found: torch.Tensor, expected: torch.Tensor, start: int, entry: TensorEntry
) -> None:
    """Add the differences of one chunk: bytes [start, ...) of the tensor."""
    dtype = _PLAIN_DTYPES.get(entry.dtype, torch.uint8)
    size = dtype.itemsize
    differs = (found != expected).reshape(-1, size).any(dim=1)
    if comparison.first is None:
        position = int(differs.nonzero()[0])
        values = [chunk.view(dtype)[position].item() for chunk in (expected, found)]
        comparison.first = FirstDifference(_coordinate(start // size + position, entry.shape), *values)
    comparison.changed += int(differs.sum())
    comparison.max_relative = math.nan  # not measured: nothing may differ here


def _coordinate(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    coordinate: list[int] = []
    for size in reversed(shape):
        position, index = divmod(position, size)
        coordinate.insert(0, index)
    return tuple(coordinate)


def compare_weight(out: Checkpoint, source: Checkpoint, tensor: LogicalTensor, progress: Advance) -> Comparison:
    """Compare a weight by value, whatever the two checkpoints store it as."""
    rows, columns = tensor.shape
    ours, theirs = _Weight(out, tensor), _Weight(source, tensor)
    unlike = ours.unlike or theirs.unlike
    if unlike:
        return Comparison(unlike=unlike)
    progress(ours.scale_bytes, ours.entry.file)
    same_bytes = ours.has_scale_of(theirs)
    wide = ours.is_wide or theirs.is_wide
    for first, last in _bands(rows, columns):
        found, expected = ours.codes(first, last), theirs.codes(first, last)
        if not (same_bytes and torch.equal(found, expected)):
            same_bytes = False
            if not _same_bits(ours.decode(found, first, wide), theirs.decode(expected, first, wide)):
                # Differences are rare, so only a tensor that has one is measured, from its beginning.
                progress(ours.entry.bytes - first * ours.row_bytes, ours.entry.file)
                return _measure(ours, theirs, tensor, wide)
        progress(found.numel(), ours.entry.file)
    return Comparison(same_bytes=same_bytes, elements=rows * columns)


def _bands(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """First and last row of each band."""
    band = max(1, _BAND_VALUES // columns)
    return ((first, min(first + band, rows)) for first in range(0, rows, band))


def _same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    bits = torch.int32 if found.dtype == torch.float32 else torch.int64
    return torch.equal(found.view(bits), expected.view(bits))


def _measure(ours: "_Weight", theirs: "_Weight", tensor: LogicalTensor, wide: bool) -> Comparison:
    """Compare all values of a weight, and say by how much they differ."""
    rows, columns = tensor.shape
    comparison = Comparison(same_bytes=False, elements=rows * columns)
    for first, last in _bands(rows, columns):
        found = ours.decode(ours.codes(first, last), first, wide).double()  # [rows, columns]
        expected = theirs.decode(theirs.codes(first, last), first, wide).double()
        differs = found.view(torch.int64) != expected.view(torch.int64)
        if comparison.first is None and bool(differs.any()):
            row, column = (int(index) for index in differs.nonzero()[0])
            values = (float(expected[row, column]), float(found[row, column]))
            comparison.first = FirstDifference((first + row, column), *values)
        error = found - expected
        relative = (error / expected).abs()[expected != 0]
        comparison.changed += int(differs.sum())
        if relative.numel():
            comparison.max_relative = float(torch.maximum(relative.max(), torch.tensor(comparison.max_relative)))
        comparison.error_energy += float(error.square().sum())
        comparison.signal_energy += float(expected.square().sum())
    return comparison


class _Weight:
    """A stored weight of one checkpoint, read and decoded by rows."""

    def __init__(self, checkpoint: Checkpoint, tensor: LogicalTensor) -> None:
        self._checkpoint = checkpoint
        self._shape = tensor.shape
        self.entry = checkpoint.tensors[tensor.name]
        self._scale_entry = checkpoint.tensors.get(scale_name(tensor.name))
        self.unlike = self._find_unlike()
        self._scale: torch.Tensor | None = None
        if not self.unlike and self._scale_entry is not None:
            stored = _read(checkpoint, self._scale_entry, 0, self._scale_entry.bytes)
            dtype = torch.float32 if self._scale_entry.dtype == "F32" else torch.uint8
            self._scale = decode_scale(stored.view(dtype).reshape(self._scale_entry.shape), self._scale_entry.dtype)

    def _find_unlike(self) -> str:
        """Why these tensors are no such weight; "" if they are one."""
        rows, columns = self._shape
        where, dtype = self._checkpoint.where, self.entry.dtype
        if dtype not in _VALUES_A_BYTE or self.entry.bytes * _VALUES_A_BYTE[dtype] != rows * columns:
            return f"in {where} is {dtype} {list(self.entry.shape)}, expected the values of {[rows, columns]}"
        if dtype not in _BLOCKS:
            return ""
        block = _BLOCKS[dtype]
        expected = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
        if self._scale_entry is None:
            return f"in {where} has no scale, expected one of {list(expected)}"
        if self._scale_entry.shape != expected or self._scale_entry.dtype not in ("F8_E8M0", "F32"):
            found = f"{self._scale_entry.dtype} {list(self._scale_entry.shape)}"
            return f"in {where} has scale {found}, expected {list(expected)}"
        return ""

    @property
    def is_wide(self) -> bool:
        """True where float32 may not hold the values exactly."""
        return self._scale is not None and needs_float64(self._scale)

    def has_scale_of(self, other: "_Weight") -> bool:
        """True if both are stored with the same dtypes and the same scales."""
        dtypes = [entry and entry.dtype for entry in (self.entry, self._scale_entry)]
        if dtypes != [entry and entry.dtype for entry in (other.entry, other._scale_entry)]:
            return False
        if self._scale is None or other._scale is None:
            return True
        return torch.equal(self._scale.view(torch.int32), other._scale.view(torch.int32))

    @property
    def scale_bytes(self) -> int:
        """Stored bytes of the scales."""
        return self._scale_entry.bytes if self._scale_entry else 0

    @property
    def row_bytes(self) -> int:
        """Stored bytes of one row."""
        return self.entry.bytes // self._shape[0]

    def codes(self, first: int, last: int) -> torch.Tensor:
        """Stored bytes of rows [first, last): uint8 [rows, bytes a row]."""
        stored = _read(self._checkpoint, self.entry, first * self.row_bytes, last * self.row_bytes)
        return stored.reshape(last - first, self.row_bytes)

    def decode(self, codes: torch.Tensor, first: int, wide: bool) -> torch.Tensor:
        """Values of rows from `first` on: [rows, columns]."""
        rows, columns = codes.shape[0], self._shape[1]
        scale = None
        if self._scale is not None:
            scale = spread(self._scale, first, rows, columns, _BLOCKS[self.entry.dtype])
        return decode_weight(codes, self.entry.dtype, scale, wide)


def _read(checkpoint: Checkpoint, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
    """Bytes [start, stop) of a tensor: uint8 [bytes]."""
    buffer = bytearray(stop - start)
    checkpoint.files.read_into(entry.file, entry.start + start, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=torch.uint8)
