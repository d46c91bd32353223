"""Cast rows of a weight matrix from one encoding into another, and count what the cast changed.

A `Weight` carries codes and scales together. `cast` fills a target Weight; its answer says how many values changed, so
that "exact" is a count of zero over every block, never a promise. R rows: a multiple of 128, or the last rows of the
matrix. C columns.

    codes   fp4 uint8 [R, C/2] | fp8 uint8 [R, C] | bf16 uint16 [R, C], bit patterns
    scale   E8M0 uint8 | F32 float32 | None; shape Encoding.scale_shape((R, C))
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from v4quant.encodings import BF16, FP4, FP8, FP8_F32_SCALE, Encoding
from v4quant.numerics import codec, e8m0
from v4quant.numerics.casts import CastCheck, bf16_to_fp4, bf16_to_fp8, fp4_to_bf16, fp4_to_fp8, fp8_to_bf16
from v4quant.numerics.finite import check_bf16, check_e4m3, check_e8m0, check_f32_scale

Array = npt.NDArray[Any]

# What the reference codec takes at a time: 4 MiB of float64, so that its many middle steps take little memory.
TILE = (128, 4096)

_CODES: dict[str, np.dtype[Any]] = {
    "I8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(np.uint8),
    "BF16": np.dtype(np.uint16),
}
_SCALES: dict[str, np.dtype[Any]] = {"F8_E8M0": np.dtype(np.uint8), "F32": np.dtype(np.float32)}


def codes_dtype(encoding: Encoding) -> np.dtype[Any]:
    """numpy dtype of the stored codes."""
    return _CODES[encoding.weight_dtype]


def scale_dtype(encoding: Encoding) -> np.dtype[Any]:
    """numpy dtype of the stored scales."""
    return _SCALES[encoding.scale_dtype]


@dataclass(frozen=True)
class Weight:
    """Rows of a weight matrix in one encoding; `codes` and `scale` as in the module's table."""

    encoding: Encoding
    codes: Array
    scale: Array | None = None

    def parts(self) -> tuple[Array, ...]:
        """The arrays that are stored: codes, and scale where there is one."""
        return (self.codes,) if self.scale is None else (self.codes, self.scale)

    @property
    def shape(self) -> tuple[int, int]:
        """Logical [R, C]."""
        rows, columns = self.codes.shape
        return (rows, columns * self.encoding.values_a_byte)

    @property
    def scales(self) -> Array:
        """The scales of an encoding that has them."""
        assert self.scale is not None, f"{self.encoding.name} has scales"
        return self.scale

    def rows(self, first: int, stop: int) -> "Weight":
        """Rows first to stop - 1, as views; first is a multiple of 128."""
        codes = self.codes[first:stop]
        if self.scale is None or self.encoding.block is None:
            return Weight(self.encoding, codes)
        return Weight(self.encoding, codes, self.scale[_divided(slice(first, stop), self.encoding.block.rows)])

    def tile(self, row: int, column: int) -> "Weight":
        """The part from this row and column on, TILE at most, as views; both are multiples of 128."""
        rows, columns = slice(row, row + TILE[0]), slice(column, column + TILE[1])
        codes = self.codes[rows, _divided(columns, self.encoding.values_a_byte)]
        if self.scale is None or self.encoding.block is None:
            return Weight(self.encoding, codes)
        block = self.encoding.block
        return Weight(self.encoding, codes, self.scale[_divided(rows, block.rows), _divided(columns, block.columns)])


def _divided(span: slice, size: int) -> slice:
    """The same span counted in units of `size`."""
    return slice(span.start // size, -(-span.stop // size))


def tiles(*weights: Weight) -> Iterator[tuple[Weight, ...]]:
    """Cut weights of the same logical shape into the same tiles."""
    rows, columns = weights[0].shape
    for row in range(0, rows, TILE[0]):
        for column in range(0, columns, TILE[1]):
            yield tuple(weight.tile(row, column) for weight in weights)


class Scratch:
    """Buffers that one worker uses again and again, by slot; touching fresh memory costs as much as casting it."""

    def __init__(self) -> None:
        self._slots: dict[str, npt.NDArray[np.uint8]] = {}

    def take(self, slot: str, size: int) -> npt.NDArray[np.uint8]:
        """Uninitialised uint8 [size]; valid until the slot is taken again."""
        if slot not in self._slots or self._slots[slot].size < size:
            self._slots[slot] = np.empty(size, np.uint8)
        return self._slots[slot][:size]

    def array(self, slot: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Uninitialised array of this shape and dtype; valid until the slot is taken again."""
        return self.take(slot, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)

    def weight(self, slot: str, encoding: Encoding, shape: tuple[int, int]) -> Weight:
        """Uninitialised Weight for a logical [R, C]."""
        codes = self.array(f"{slot} codes", encoding.storage_shape(shape), codes_dtype(encoding))
        if encoding.block is None:
            return Weight(encoding, codes)
        return Weight(encoding, codes, self.array(f"{slot} scale", encoding.scale_shape(shape), scale_dtype(encoding)))


def check_finite(weight: Weight) -> None:
    """Check codes and scales that are copied rather than cast.

    Raises:
        NonFiniteError: at the first that is no finite number, or an F32 scale that is not positive.
    """
    if weight.encoding.scale_dtype == "F8_E8M0":
        check_e8m0(weight.scales)
    elif weight.encoding.scale_dtype == "F32":
        check_f32_scale(weight.scales)
    if weight.encoding.weight_dtype == "F8_E4M3":
        check_e4m3(weight.codes)
    elif weight.encoding == BF16:
        check_bf16(weight.codes)


def decode(weight: Weight) -> npt.NDArray[np.float64]:
    """Values of a weight, exact, by the reference codec: float64 [R, C].

    Raises:
        NonFiniteError: as check_finite.
    """
    if weight.encoding == FP4:
        return codec.decode_fp4(weight.codes, weight.scales)
    if weight.encoding == FP8:
        return codec.decode_fp8(weight.codes, weight.scales)
    if weight.encoding == FP8_F32_SCALE:
        return codec.decode_fp8_f32(weight.codes, weight.scales)
    return codec.decode_bf16(weight.codes)


def cast(source: Weight, target: Weight, scratch: Scratch, like_scale: Array | None = None) -> CastCheck:
    """Fill `target` with the values of `source`, and count what changed.

    Args:
        source: rows of a weight.
        target: the same rows in another encoding; its arrays are overwritten.
        scratch: buffers for middle steps.
        like_scale: scales of an original in the target's encoding, used wherever they reproduce the values.

    Returns:
        Counts over all elements; nothing inexact means that every value and every sign of zero is the same.

    Raises:
        NonFiniteError: if a source value is NaN or infinite; the coordinate counts from these rows.
    """
    return _CASTS[source.encoding, target.encoding](source, target, scratch, like_scale)


_Cast = Callable[[Weight, Weight, Scratch, Array | None], CastCheck]


def _fp4_to_fp8(source: Weight, target: Weight, scratch: Scratch, like: Array | None) -> CastCheck:
    if like is not None:
        # Only the encoder knows how to try a given scale; BF16 in between holds every value, or its check says no.
        check = _through(BF16)(source, target, scratch, like)
        if not check.inexact:
            return check
    return fp4_to_fp8(source.codes, source.scales, target.codes, target.scales)


def _fp4_to_bf16(source: Weight, target: Weight, _scratch: Scratch, _like: Array | None) -> CastCheck:
    return fp4_to_bf16(source.codes, source.scales, target.codes)


def _fp8_to_bf16(source: Weight, target: Weight, _scratch: Scratch, _like: Array | None) -> CastCheck:
    return fp8_to_bf16(source.codes, source.scales, target.codes)


def _bf16_to_fp4(source: Weight, target: Weight, _scratch: Scratch, like: Array | None) -> CastCheck:
    return bf16_to_fp4(source.codes, target.codes, target.scales, like)


def _bf16_to_fp8(source: Weight, target: Weight, _scratch: Scratch, like: Array | None) -> CastCheck:
    return bf16_to_fp8(source.codes, target.codes, target.scales, like)


def _to_f32_scales(source: Weight, target: Weight, scratch: Scratch, like: Array | None) -> CastCheck:
    """Any encoding -> FP8 with F32 scales: cast to E8M0 scales, which float32 holds exactly."""
    like_e8m0 = None if like is None else e8m0.from_float32(like)
    scale_e8m0 = scratch.array("middle scale", target.scales.shape, np.dtype(np.uint8))
    middle = Weight(FP8, target.codes, scale_e8m0)
    if source.encoding == FP8:
        check_finite(source)
        middle.codes[...], scale_e8m0[...] = source.codes, source.scales
        check = CastCheck()
    else:
        check = cast(source, middle, scratch, like_e8m0)
    target.scales[...] = e8m0.E8M0_VALUES[scale_e8m0]
    return check


def _from_f32_scales(source: Weight, target: Weight, scratch: Scratch, like: Array | None) -> CastCheck:
    """FP8 with F32 scales -> another encoding: by way of E8M0 scales where all are powers of two, else by float64."""
    check_finite(source)
    scale_e8m0 = e8m0.from_float32(source.scales)
    if scale_e8m0 is None:
        return _by_float64(source, target, like)
    if target.encoding == FP8:
        target.codes[...], target.scales[...] = source.codes, scale_e8m0
        return CastCheck()
    return cast(Weight(FP8, source.codes, scale_e8m0), target, scratch, like)


def _through(middle_encoding: Encoding) -> _Cast:
    """A cast in two steps; where the first one would round, values go from source to target in one, by float64."""

    def two_steps(source: Weight, target: Weight, scratch: Scratch, like: Array | None) -> CastCheck:
        middle = scratch.weight("middle", middle_encoding, source.shape)
        if cast(source, middle, scratch).inexact:
            return _by_float64(source, target, like)
        return cast(middle, target, scratch, like)

    return two_steps


def _by_float64(source: Weight, target: Weight, like: Array | None) -> CastCheck:
    """Any cast by the reference codec: slow, for numbers that the fast casts cannot take through BF16."""
    check_finite(source)
    original = Weight(target.encoding, target.codes, like)  # its codes are never read
    check = CastCheck()
    for of_source, of_target, of_original in tiles(source, target, original):
        check = check.merged(_encode(decode(of_source), of_target, of_original.scale))
    return check


def _encode(values: npt.NDArray[np.float64], target: Weight, like: Array | None) -> CastCheck:
    if target.encoding == FP4:
        return codec.encode_fp4_float64(values, target.codes, target.scales, like)
    if target.encoding == FP8:
        return codec.encode_fp8_float64(values, target.codes, target.scales, like)
    return codec.encode_bf16_float64(values, target.codes)


_CASTS: dict[tuple[Encoding, Encoding], _Cast] = {
    (FP4, FP8): _fp4_to_fp8,
    (FP4, BF16): _fp4_to_bf16,
    (FP8, BF16): _fp8_to_bf16,
    (FP8, FP4): _through(BF16),
    (BF16, FP4): _bf16_to_fp4,
    (BF16, FP8): _bf16_to_fp8,
    **{(encoding, FP8_F32_SCALE): _to_f32_scales for encoding in (FP4, FP8, BF16)},
    **{(FP8_F32_SCALE, encoding): _from_f32_scales for encoding in (FP4, FP8, BF16)},
}
