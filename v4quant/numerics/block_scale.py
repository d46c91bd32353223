"""The block scale rule: 2^ceil(log2(amax / max)), the least power of two under which the largest weight fits.

amax is the largest magnitude of the block, max the largest of its format (6 or 448). It is the rule of DeepSeek's own
quantisers (`scale_fmt: ue8m0`), except that they floor amax (at 1e-4 for FP8), which would flush blocks of small
weights to zero; v4quant has no floor. It is computed from exponents and significands, never by a logarithm.
"""

import math

import numpy as np
import numpy.typing as npt

from v4quant.numerics.e8m0 import E8M0_BIAS, E8M0_LARGEST

# The scale of an all-zero block, 2^-126: what DeepSeek's FP4 quantiser writes (amax floored at 6 x 2^-126), and the
# least scale that every decoder reads alike (see e8m0).
ALL_ZERO_BYTE = 1


def block_scale_byte(amax: npt.NDArray[np.float64], largest: float) -> npt.NDArray[np.uint8]:
    """E8M0 bytes of the scales for blocks of these largest magnitudes.

    Args:
        amax: float64, finite, not negative, any shape.
        largest: the largest number of the element format, E2M1_MAX or E4M3_MAX.

    Returns:
        uint8 of the same shape, held within E8M0's range.
    """
    significand, exponent = np.frexp(amax)  # amax = significand x 2^exponent, 0.5 <= significand < 1
    largest_significand, largest_exponent = math.frexp(largest)
    power = exponent - largest_exponent + (significand > largest_significand)
    byte = np.clip(power + E8M0_BIAS, 0, E8M0_LARGEST).astype(np.uint8)
    return np.where(amax == 0, np.uint8(ALL_ZERO_BYTE), byte)
