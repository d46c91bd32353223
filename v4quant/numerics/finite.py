"""Find the first number that is not finite; run before anything else is believed of a tensor."""

from typing import Any

import numpy as np
import numpy.typing as npt

from v4quant.numerics.bf16 import BF16_INFINITY
from v4quant.numerics.e4m3 import E4M3_NAN
from v4quant.numerics.e8m0 import E8M0_NAN
from v4quant.numerics.errors import NonFiniteError

_SLICE_BYTES = 2**20  # temporaries stay in cache


def _first(flags: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Row and column of the first set flag."""
    row, column = np.unravel_index(int(np.argmax(flags)), flags.shape)
    return int(row), int(column)


def _row_slices(array: npt.NDArray[Any]) -> range:
    """Starts of row slices of about _SLICE_BYTES; the step is their length."""
    return range(0, array.shape[0], max(1, _SLICE_BYTES // max(1, array.shape[1] * array.itemsize)))


def check_e8m0(scale: npt.NDArray[np.uint8]) -> None:
    """Check E8M0 scales [r, c].

    Raises:
        NonFiniteError: at the first NaN, byte 255.
    """
    if scale.size and scale.max() == E8M0_NAN:
        raise NonFiniteError(*_first(scale == E8M0_NAN), "NaN (E8M0 byte 0xFF)", in_scale=True)


def check_e4m3(codes: npt.NDArray[np.uint8]) -> None:
    """Check E4M3 weights [R, C].

    Raises:
        NonFiniteError: at the first NaN, byte 0x7F or 0xFF.
    """
    rows = _row_slices(codes)
    for start in rows:
        flags = (codes[start : start + rows.step] & E4M3_NAN) == E4M3_NAN
        if flags.any():
            row, column = _first(flags)
            raise NonFiniteError(start + row, column, f"NaN (E4M3 byte 0x{codes[start + row, column]:02X})")


def check_bf16(bits: npt.NDArray[np.uint16]) -> None:
    """Check BF16 weights [R, C].

    Raises:
        NonFiniteError: at the first NaN or infinity.
    """
    rows = _row_slices(bits)
    for start in rows:
        flags = (bits[start : start + rows.step] & 0x7FFF) >= BF16_INFINITY
        if flags.any():
            row, column = _first(flags)
            found = int(bits[start + row, column])
            name = {BF16_INFINITY: "Inf", 0x8000 | BF16_INFINITY: "-Inf"}.get(found, "NaN")
            raise NonFiniteError(start + row, column, f"{name} (BF16 0x{found:04X})")


def check_f32_scale(scale: npt.NDArray[np.float32]) -> None:
    """Check F32 scales [r, c].

    Raises:
        NonFiniteError: at the first that is NaN, infinite, zero or negative.
    """
    flags = ~(np.isfinite(scale) & (scale > 0))
    if flags.any():
        row, column = _first(flags)
        found = scale[row, column]
        raise NonFiniteError(row, column, f"{found} (F32; a scale is positive and finite)", in_scale=True)


def check_float64(values: npt.NDArray[np.float64]) -> None:
    """Check decoded weights [R, C].

    Raises:
        NonFiniteError: at the first NaN or infinity.
    """
    flags = ~np.isfinite(values)
    if flags.any():
        row, column = _first(flags)
        raise NonFiniteError(row, column, str(values[row, column]))
