"""The reference codec: every encoding to and from float64, by tables and exact arithmetic, in numpy.

float64 holds every E2M1, E4M3 and BF16 value times any E8M0 or float32 scale exactly, so decoding never rounds and
encoding rounds once. The fast casts must agree with this module (the tests say so), fall back on it where a number
leaves the range that they are fast in, and measurements decode with it.

    packed  uint8 [R, C/2]    codes  uint8 [R, C]    bits  uint16 [R, C]    values  float64 [R, C]
    FP4 scale  uint8 [R, C/32]    FP8 scale  uint8 or float32 [ceil(R/128), ceil(C/128)]
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from v4quant.numerics import bf16, e2m1, e4m3
from v4quant.numerics.block_scale import block_scale_byte
from v4quant.numerics.check import CastCheck
from v4quant.numerics.e2m1 import E2M1_MAX, E2M1_VALUES
from v4quant.numerics.e4m3 import E4M3_MAX, E4M3_VALUES
from v4quant.numerics.e8m0 import E8M0_NAN, E8M0_VALUES
from v4quant.numerics.finite import check_bf16, check_e4m3, check_e8m0, check_f32_scale, check_float64

FP4_BLOCK = (1, 32)
FP8_BLOCK = (128, 128)

Float64 = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]


def decode_fp4(packed: Bytes, scale_e8m0: Bytes) -> Float64:
    """Values of FP4 weights.

    Raises:
        NonFiniteError: if a scale is NaN.
    """
    check_e8m0(scale_e8m0)
    codes = E2M1_VALUES[e2m1.unpack(packed)]
    return codes * _spread(E8M0_VALUES[scale_e8m0], FP4_BLOCK, codes.shape)


def decode_fp8(codes: Bytes, scale_e8m0: Bytes) -> Float64:
    """Values of FP8 weights with E8M0 scales.

    Raises:
        NonFiniteError: if a scale or a weight is NaN.
    """
    check_e8m0(scale_e8m0)
    check_e4m3(codes)
    return E4M3_VALUES[codes] * _spread(E8M0_VALUES[scale_e8m0], FP8_BLOCK, codes.shape)


def decode_fp8_f32(codes: Bytes, scale: npt.NDArray[np.float32]) -> Float64:
    """Values of FP8 weights with float32 scales.

    Raises:
        NonFiniteError: if a scale is not positive and finite, or a weight is NaN.
    """
    check_f32_scale(scale)
    check_e4m3(codes)
    return E4M3_VALUES[codes] * _spread(scale.astype(np.float64), FP8_BLOCK, codes.shape)


def decode_bf16(bits: npt.NDArray[np.uint16]) -> Float64:
    """Values of BF16 weights.

    Raises:
        NonFiniteError: if a weight is NaN or infinite.
    """
    check_bf16(bits)
    return bf16.decode(bits)


def encode_bf16_float64(values: Float64, out: npt.NDArray[np.uint16]) -> CastCheck:
    """Round to BF16, nearest even; what is too large for BF16 becomes its largest number and counts as inexact.

    Raises:
        NonFiniteError: if a value is NaN or infinite.
    """
    check_float64(values)
    out[...] = bf16.encode(values)
    return compare(values, bf16.decode(out))


def encode_fp4_float64(
    values: Float64, out: Bytes, out_scale_e8m0: Bytes, like_scale: Bytes | None = None
) -> CastCheck:
    """Round to FP4: block scales by the rule of block_scale, codes to nearest even.

    Args:
        like_scale: a group uses this scale wherever that reproduces its values exactly, and else the rule.

    Raises:
        NonFiniteError: if a value is NaN or infinite.
    """

    def quantise(scale_e8m0: Bytes) -> tuple[Bytes, Float64]:
        scale = _spread(E8M0_VALUES[scale_e8m0], FP4_BLOCK, values.shape)
        codes = e2m1.encode(values / scale)
        return codes, E2M1_VALUES[codes] * scale

    codes, out_scale_e8m0[...], check = _encode(values, FP4_BLOCK, E2M1_MAX, quantise, like_scale)
    out[...] = e2m1.pack(codes)
    return check


def encode_fp8_float64(
    values: Float64, out: Bytes, out_scale_e8m0: Bytes, like_scale: Bytes | None = None
) -> CastCheck:
    """Round to FP8 with E8M0 scales: as encode_fp4_float64, in blocks of 128x128.

    Raises:
        NonFiniteError: if a value is NaN or infinite.
    """

    def quantise(scale_e8m0: Bytes) -> tuple[Bytes, Float64]:
        scale = _spread(E8M0_VALUES[scale_e8m0], FP8_BLOCK, values.shape)
        codes = e4m3.encode(values / scale)
        return codes, E4M3_VALUES[codes] * scale

    out[...], out_scale_e8m0[...], check = _encode(values, FP8_BLOCK, E4M3_MAX, quantise, like_scale)
    return check


def compare(source: Float64, output: Float64) -> CastCheck:
    """Count the elements that differ in value or in the sign of zero."""
    sign_lost = np.signbit(source) != np.signbit(output)
    return CastCheck(
        inexact=int(np.count_nonzero((source != output) | sign_lost)),
        negative_zeros_lost=int(np.count_nonzero((source == 0) & np.signbit(source) & sign_lost)),
    )


def _encode(
    values: Float64,
    block: tuple[int, int],
    largest: float,
    quantise: Callable[[Bytes], tuple[Bytes, Float64]],
    like_scale: Bytes | None,
) -> tuple[Bytes, Bytes, CastCheck]:
    """Codes, scales and check of values; `quantise` gives codes and decoded values under given scales."""
    check_float64(values)
    scale = block_scale_byte(_block_maximum(np.abs(values), block), largest)
    if like_scale is not None:
        usable = like_scale != E8M0_NAN
        tried = np.where(usable, like_scale, scale)
        _, decoded = quantise(tried)
        wrong = (decoded != values) | (np.signbit(decoded) != np.signbit(values))
        scale = np.where(_block_maximum(wrong, block), scale, tried)
    codes, decoded = quantise(scale)
    return codes, scale, compare(values, decoded)


def _spread(scale: Float64, block: tuple[int, int], shape: tuple[int, ...]) -> Float64:
    """Repeat block scales over their elements; edge blocks are cut."""
    rows, columns = shape
    return scale.repeat(block[0], axis=0)[:rows].repeat(block[1], axis=1)[:, :columns]


def _block_maximum(array: npt.NDArray[Any], block: tuple[int, int]) -> npt.NDArray[Any]:
    """Largest element of each block; edge blocks may be smaller."""
    rows, columns = (np.arange(0, size, step) for size, step in zip(array.shape, block, strict=True))
    return np.maximum.reduceat(np.maximum.reduceat(array, rows, axis=0), columns, axis=1)
