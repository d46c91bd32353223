"""The five casts of weight matrices, fast: they fill the arrays they are given and count what they changed.

R rows, C columns (FP4: a multiple of 32; edge blocks of FP8 may be cut). All arrays are C-contiguous:

    packed  uint8 [R, C/2], FP4            scale_e8m0  uint8 [R, C/32]
    codes   uint8 [R, C], FP8 (E4M3)       scale_e8m0  uint8 [ceil(R/128), ceil(C/128)]
    bits    uint16 [R, C], BF16

Rounding is to nearest, ties to even, saturating, sign of zero kept. Whatever does not fit the target counts as inexact
and becomes its largest number, never infinity. Casts release the GIL, so threads may each take a band of rows (a
multiple of 128 of them). Common groups take the vector kernels, for which tests prove every (code, scale) pair
against the reference codec; the rest (extreme scales, odd widths) go through that codec itself.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from v4quant.numerics import bf16, codec, e4m3, fp4_kernels, fp8_kernels
from v4quant.numerics.bf16 import BF16_INFINITY
from v4quant.numerics.check import CastCheck
from v4quant.numerics.e2m1 import E2M1_VALUES
from v4quant.numerics.e8m0 import E8M0_VALUES
from v4quant.numerics.errors import NonFiniteError
from v4quant.numerics.finite import check_bf16, check_e4m3, check_e8m0
from v4quant.numerics.fp4_kernels import FP4_TO_FP8_SPREAD_BOUND

__all__ = [
    "FP4_TO_FP8_SPREAD_BOUND",
    "CastCheck",
    "NonFiniteError",
    "bf16_to_fp4",
    "bf16_to_fp8",
    "fp4_to_bf16",
    "fp4_to_fp8",
    "fp8_to_bf16",
]

GROUP = 32
BLOCK = 128
_BATCH_GROUPS = 4096  # groups that the reference codec takes at a time: 1 MiB of float64

Bytes = npt.NDArray[np.uint8]
Bits = npt.NDArray[np.uint16]


def fp4_to_bf16(packed: Bytes, scale_e8m0: Bytes, out: Bits) -> CastCheck:
    """Decode FP4 to BF16; exact for scale bytes up to 252, checked above.

    Raises:
        NonFiniteError: if a scale is NaN.
        ValueError: if shapes or dtypes do not fit.
    """
    rows, columns = _fp4_shape(packed)
    _require("scale_e8m0", scale_e8m0, np.uint8, (rows, columns // GROUP))
    _require("out", out, np.uint16, (rows, columns), written=True)
    check_e8m0(scale_e8m0)
    values, rounded = _bf16_of_fp4()
    return CastCheck(fp4_kernels.decode_to_bf16(_frozen(packed), _frozen(scale_e8m0), values, rounded, out))


def fp4_to_fp8(packed: Bytes, scale_e8m0: Bytes, out: Bytes, out_scale_e8m0: Bytes) -> CastCheck:
    """Recode FP4 as FP8 under block scales 2^(K - 6), K the largest scale exponent of the 128x128 block.

    K is that of DeepSeek's own converter. Groups of zeros are left out of K where the scales of a block spread beyond
    FP4_TO_FP8_SPREAD_BOUND; within it every value is exact, beyond it every value is checked.

    Raises:
        NonFiniteError: if a scale is NaN.
        ValueError: if shapes or dtypes do not fit.
    """
    rows, columns = _fp4_shape(packed)
    _require("scale_e8m0", scale_e8m0, np.uint8, (rows, columns // GROUP))
    _require("out", out, np.uint8, (rows, columns), written=True)
    _require("out_scale_e8m0", out_scale_e8m0, np.uint8, _block_shape(rows, columns), written=True)
    check_e8m0(scale_e8m0)
    packed, scale_e8m0 = _frozen(packed), _frozen(scale_e8m0)
    spread = fp4_kernels.choose_block_scales(packed, scale_e8m0, out_scale_e8m0)
    values, rounded = _fp8_of_fp4()
    inexact = fp4_kernels.decode_to_e4m3(packed, scale_e8m0, _frozen(out_scale_e8m0), values, rounded, out)
    return CastCheck(inexact, worst_spread=spread)


def fp8_to_bf16(codes: Bytes, scale_e8m0: Bytes, out: Bits) -> CastCheck:
    """Decode FP8 to BF16; exact for scale bytes 3 to 246, checked outside.

    Raises:
        NonFiniteError: if a scale or a weight is NaN.
        ValueError: if shapes or dtypes do not fit.
    """
    rows, columns = _matrix_shape("codes", codes, np.uint8)
    _require("scale_e8m0", scale_e8m0, np.uint8, _block_shape(rows, columns))
    _require("out", out, np.uint16, (rows, columns), written=True)
    check_e8m0(scale_e8m0)
    left = np.zeros(scale_e8m0.shape, np.bool_)
    blocks_left, nans = fp8_kernels.decode_to_bf16(_frozen(codes), _frozen(scale_e8m0), out, left)
    if blocks_left or nans:
        check_e4m3(codes)
    check = CastCheck()
    for row, column, block in _blocks(left):
        values = codec.decode_fp8(codes[block], scale_e8m0[row : row + 1, column : column + 1])
        check = check.merged(codec.encode_bf16_float64(values, out[block]))
    return check


def bf16_to_fp4(bits: Bits, out: Bytes, out_scale_e8m0: Bytes, like_scale: Bytes | None = None) -> CastCheck:
    """Encode BF16 as FP4 with scales 2^ceil(log2(amax / 6)); exact for all values that lie on an FP4 grid.

    Args:
        like_scale: scales as of an original; a group uses its own wherever that reproduces the values exactly, so
            that what was decoded from the original becomes its very bytes again.

    Raises:
        NonFiniteError: if a weight is NaN or infinite.
        ValueError: if shapes or dtypes do not fit.
    """
    rows, columns = _matrix_shape("bits", bits, np.uint16)
    if columns % GROUP:
        raise ValueError(f"bits is {list(bits.shape)}, expected a multiple of {GROUP} columns")
    groups = (rows, columns // GROUP)
    _require("out", out, np.uint8, (rows, columns // 2), written=True)
    _require("out_scale_e8m0", out_scale_e8m0, np.uint8, groups, written=True)
    like = _like_or_nothing(like_scale, groups)
    left = np.zeros(groups, np.bool_)
    inexact, zeros_lost, groups_left, largest = fp4_kernels.encode_bf16(
        _frozen(bits), like, like_scale is not None, out, out_scale_e8m0, left
    )
    if largest >= BF16_INFINITY:
        check_bf16(bits)
    check = CastCheck(inexact, zeros_lost)
    if groups_left:
        check = check.merged(_encode_groups_left(left, bits, out, out_scale_e8m0, like_scale))
    return check


def bf16_to_fp8(bits: Bits, out: Bytes, out_scale_e8m0: Bytes, like_scale: Bytes | None = None) -> CastCheck:
    """Encode BF16 as FP8 with block scales 2^ceil(log2(amax / 448)); exact for all values that lie on an FP8 grid.

    Args:
        like_scale: as in bf16_to_fp4, for blocks.

    Raises:
        NonFiniteError: if a weight is NaN or infinite.
        ValueError: if shapes or dtypes do not fit.
    """
    rows, columns = _matrix_shape("bits", bits, np.uint16)
    blocks = _block_shape(rows, columns)
    _require("out", out, np.uint8, (rows, columns), written=True)
    _require("out_scale_e8m0", out_scale_e8m0, np.uint8, blocks, written=True)
    like = _like_or_nothing(like_scale, blocks)
    left = np.zeros(blocks, np.bool_)
    inexact, zeros_lost, blocks_left, largest = fp8_kernels.encode_bf16(
        _frozen(bits), like, like_scale is not None, out, out_scale_e8m0, left
    )
    if blocks_left or largest >= BF16_INFINITY:
        check_bf16(bits)
    check = CastCheck(inexact, zeros_lost)
    for row, column, block in _blocks(left):
        one = np.s_[row : row + 1, column : column + 1]
        like_block = None if like_scale is None else like_scale[one]
        values = codec.decode_bf16(bits[block])
        check = check.merged(codec.encode_fp8_float64(values, out[block], out_scale_e8m0[one], like_block))
    return check


@cache
def _bf16_of_fp4() -> tuple[Bits, npt.NDArray[np.int64]]:
    """BF16 bits by scale byte and E2M1 code, [255, 16], and 1 for each that had to be rounded."""
    exact = E8M0_VALUES[:-1, None] * E2M1_VALUES
    bits = bf16.encode(exact)
    return bits, (bf16.decode(bits) != exact).astype(np.int64)


@cache
def _fp8_of_fp4() -> tuple[Bytes, npt.NDArray[np.int64]]:
    """E4M3 codes by offset and E2M1 code, [20, 16], and 1 for each that had to be rounded."""
    offset = np.arange(fp4_kernels.TABLE_FIRST_OFFSET, fp4_kernels.E4M3_LAST_OFFSET + 1)
    exact = np.ldexp(E2M1_VALUES, offset[:, None])
    codes = e4m3.encode(exact)
    return codes, (e4m3.E4M3_VALUES[codes] != exact).astype(np.int64)


def _encode_groups_left(
    left: npt.NDArray[np.bool_], bits: Bits, out: Bytes, out_scale_e8m0: Bytes, like_scale: Bytes | None
) -> CastCheck:
    """Encode the groups that the kernel left, by the reference codec."""
    rows, groups = np.nonzero(left)
    bits_of, out_of = bits.reshape(*left.shape, GROUP), out.reshape(*left.shape, GROUP // 2)
    check = CastCheck()
    for start in range(0, rows.size, _BATCH_GROUPS):
        batch = (rows[start : start + _BATCH_GROUPS], groups[start : start + _BATCH_GROUPS])
        packed = np.empty((batch[0].size, GROUP // 2), np.uint8)
        scale = np.empty((batch[0].size, 1), np.uint8)
        like = None if like_scale is None else like_scale[batch][:, None]
        check = check.merged(codec.encode_fp4_float64(codec.decode_bf16(bits_of[batch]), packed, scale, like))
        out_of[batch], out_scale_e8m0[batch] = packed, scale[:, 0]
    return check


def _blocks(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int, tuple[slice, slice]]]:
    """Row, column and slices of each flagged 128x128 block."""
    return [
        (row, column, np.s_[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK])
        for row, column in np.argwhere(flags).tolist()
    ]


def _block_shape(rows: int, columns: int) -> tuple[int, int]:
    return (-(-rows // BLOCK), -(-columns // BLOCK))


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A read-only view, so that each kernel is compiled for one kind of input only."""
    view = array.view()
    view.flags.writeable = False
    return view


def _like_or_nothing(like_scale: Bytes | None, shape: tuple[int, int]) -> Bytes:
    if like_scale is None:
        return _frozen(np.empty((0, 0), np.uint8))
    _require("like_scale", like_scale, np.uint8, shape)
    return _frozen(like_scale)


def _fp4_shape(packed: Bytes) -> tuple[int, int]:
    """Logical shape of packed FP4 codes."""
    rows, pairs = _matrix_shape("packed", packed, np.uint8)
    if pairs * 2 % GROUP:
        raise ValueError(f"packed is {list(packed.shape)}, expected a multiple of {GROUP // 2} columns")
    return rows, pairs * 2


def _matrix_shape(name: str, array: npt.NDArray[Any], dtype: type[np.generic]) -> tuple[int, int]:
    if array.ndim != 2:
        raise ValueError(f"{name} has {array.ndim} dimensions, expected 2")
    rows, columns = array.shape
    _require(name, array, dtype, (rows, columns))
    return rows, columns


def _require(
    name: str, array: npt.NDArray[Any], dtype: type[np.generic], shape: tuple[int, int], *, written: bool = False
) -> None:
    """Check what a kernel takes for granted: it addresses memory directly."""
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, expected {dtype.__name__} {list(shape)}")
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise ValueError(f"{name} is not contiguous; pass numpy.ascontiguousarray({name})")
    if written and not array.flags.writeable:
        raise ValueError(f"{name} is read-only, but it is to be written")
