"""What stored weights mean, by ml_dtypes and numpy alone: the oracle of the conversion tests. It imports no v4quant.

R rows, C columns:

    codes   int8 [R, C/2], two FP4 codes a byte, low nibble first | float8_e4m3fn [R, C] | bfloat16 [R, C]
    scale   float8_e8m0fnu or float32: [R, C/32] for FP4, [ceil(R/128), ceil(C/128)] for FP8; None for bfloat16
"""

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
BF16 = np.dtype(ml_dtypes.bfloat16)

_BLOCKS = {np.dtype(np.int8): (1, 32), E4M3: (128, 128)}


def decode(codes: Array, scale: Array | None) -> Float64:
    """Values, exact: float64 [R, C]."""
    if codes.dtype == np.int8:
        stored = codes.view(np.uint8)
        nibbles = np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)
        values: Float64 = nibbles.view(E2M1).astype(np.float64)
    else:
        values = codes.astype(np.float64)
    return values if scale is None else values * spread(scale, codes.dtype, values.shape)


def spread(scale: Array, codes_dtype: np.dtype[Any], shape: tuple[int, ...]) -> Float64:
    """The scale of each element: float64 [R, C]; blocks at the edges are cut."""
    rows, columns = _BLOCKS[codes_dtype]
    grown: Float64 = scale.astype(np.float64).repeat(rows, axis=0).repeat(columns, axis=1)
    return grown[: shape[0], : shape[1]]


def differs(found: Float64, expected: Float64) -> npt.NDArray[np.bool_]:
    """Where two arrays differ in value or in the sign of zero."""
    wrong: npt.NDArray[np.bool_] = (found != expected) | (np.signbit(found) != np.signbit(expected))
    return wrong


def nearest(values: Float64, dtype: np.dtype[Any]) -> Float64:
    """The nearest numbers of a small format by search among all of them: ties to even, saturating, sign kept."""
    codes = np.arange({E2M1: 8, E4M3: 0x7F, BF16: 0x7F80}[dtype])
    grid = codes.astype(np.uint16 if dtype == BF16 else np.uint8).view(dtype).astype(np.float64)  # magnitudes, rising
    magnitude = np.minimum(np.abs(values), grid[-1])
    above = np.searchsorted(grid, magnitude)  # the first number that is not less
    below = np.maximum(above - 1, 0)
    up, down = grid[above] - magnitude, magnitude - grid[below]
    chosen = np.where(down == up, np.where(above % 2 == 0, above, below), np.where(up < down, above, below))
    result: Float64 = np.copysign(grid[chosen], values)
    return result


def rounding_error(output: Float64, source: Float64) -> dict[str, float]:
    """What a certificate says of a rounded weight, by numpy's own sums."""
    error = output - source
    used = source != 0
    rms = float(np.linalg.norm(error) / np.linalg.norm(source))
    return {
        "changed_share": float(differs(output, source).mean()),
        "max_relative_error": float(np.abs(error[used] / source[used]).max()),
        "rms_relative_error": rms,
        "sqnr_db": 20 * math.log10(1 / rms),
    }
