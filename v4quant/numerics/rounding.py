"""The one rounding rule of v4quant: nearest, ties to even, saturating, sign of zero kept. Exact, in float64."""

import numpy as np
import numpy.typing as npt


def round_to_nearest_even(
    values: npt.NDArray[np.float64], *, significand_bits: int, least_exponent: int, largest: float
) -> npt.NDArray[np.float64]:
    """Round to the nearest number of a small binary floating-point format; ties go to the even significand.

    Args:
        values: float64, finite, any shape.
        significand_bits: bits of a normal number's significand, the hidden one included.
        least_exponent: exponent of the least normal number; below it numbers are evenly spaced (subnormal).
        largest: the largest finite number; what lies beyond becomes it, never infinity.
    """
    _, exponent = np.frexp(values)  # |value| in [2^(exponent - 1), 2^exponent)
    spacing = np.ldexp(1.0, np.maximum(exponent, least_exponent + 1) - significand_bits)
    # Dividing by a power of two is exact, and rint rounds half to even.
    rounded: npt.NDArray[np.float64] = np.clip(np.rint(values / spacing) * spacing, -largest, largest)
    return rounded
