"""E4M3 (FP8, the `fn` variant): no infinities, largest 448, least subnormal 2^-9, NaN at 0x7F and 0xFF.

Source: OCP 8-bit Floating Point Specification (OFP8) v1.0, table 1.
"""

import numpy as np
import numpy.typing as npt

from v4quant.numerics.rounding import round_to_nearest_even

E4M3_MAX = 448.0
E4M3_NAN = 0x7F  # and 0xFF


def _magnitudes() -> npt.NDArray[np.float64]:
    """Values of codes 0x00 to 0x7E, ascending."""
    code = np.arange(E4M3_NAN)
    exponent, mantissa = code >> 3, code & 7
    # 1.mantissa x 2^(exponent - 7), or 0.mantissa x 2^-6 where the exponent field is zero.
    magnitudes: npt.NDArray[np.float64] = np.ldexp(
        np.where(exponent == 0, mantissa, 8 + mantissa) / 8, np.maximum(exponent, 1) - 7
    )
    return magnitudes


_MAGNITUDES = _magnitudes()
E4M3_VALUES: npt.NDArray[np.float64] = np.concatenate([_MAGNITUDES, [np.nan], -_MAGNITUDES, [np.nan]])


def encode(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Codes of the nearest E4M3 numbers: ties to even, saturating at 448, sign of zero kept. Values are finite."""
    rounded = round_to_nearest_even(values, significand_bits=4, least_exponent=-6, largest=E4M3_MAX)
    codes = np.searchsorted(_MAGNITUDES, np.abs(rounded)).astype(np.uint8)
    return np.where(np.signbit(values), codes | np.uint8(0x80), codes)
