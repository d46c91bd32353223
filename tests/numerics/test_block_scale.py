import math

import numpy as np
import pytest

from v4quant.numerics.block_scale import ALL_ZERO_BYTE, block_scale_byte


@pytest.mark.parametrize("largest", [6.0, 448.0])
@pytest.mark.parametrize("exponent", [-120, -5, 0, 3, 100])
def test_the_largest_weight_fits_and_half_the_scale_would_be_too_small(largest: float, exponent: int) -> None:
    unit = math.ldexp(largest, exponent)
    amax = np.array([unit, math.nextafter(unit, math.inf), unit * 1.99, math.nextafter(unit / 2, 0), unit / 2])
    scale = np.ldexp(1.0, block_scale_byte(amax, largest).astype(int) - 127)
    np.testing.assert_array_equal(scale, np.ldexp(1.0, exponent + np.array([0, 1, 1, -1, -1])))
    assert np.all(amax <= largest * scale)
    assert np.all(amax > largest * scale / 2)


def test_zero_blocks_and_the_ends_of_e8m0() -> None:
    amax = np.array([0.0, 2.0**-133, 6.0 * 2.0**-127, 1e300])
    np.testing.assert_array_equal(block_scale_byte(amax, 6.0), [ALL_ZERO_BYTE, 0, 0, 254])
