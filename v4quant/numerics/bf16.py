"""BF16: the upper half of a float32. Its bit patterns are kept as uint16.

Source: the float32 layout of IEEE 754-2019 with 16 mantissa bits dropped; least subnormal 2^-133.
"""

import numpy as np
import numpy.typing as npt

from v4quant.numerics.rounding import round_to_nearest_even

BF16_MAX = float(np.ldexp(255.0, 120))  # 0x7F7F: 1.9921875 x 2^127
BF16_INFINITY = 0x7F80  # the least magnitude that is no finite number


def decode(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    """Values of BF16 bit patterns, exact; any shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def encode(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """Bits of the nearest BF16 numbers: ties to even, saturating at BF16_MAX, sign of zero kept. Values are finite."""
    rounded = round_to_nearest_even(values, significand_bits=8, least_exponent=-126, largest=BF16_MAX)
    return (rounded.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
