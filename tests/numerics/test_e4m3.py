import ml_dtypes
import numpy as np
import torch

from v4quant.numerics import e4m3
from v4quant.numerics.e4m3 import E4M3_VALUES

CODES = np.arange(256, dtype=np.uint8)
FINITE = CODES[(CODES & 0x7F) != 0x7F]


def test_every_code_has_the_value_that_ml_dtypes_and_torch_give() -> None:
    oracle = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    by_torch = torch.from_numpy(CODES.copy()).view(torch.float8_e4m3fn).to(torch.float64).numpy()
    for expected in (oracle, by_torch):
        np.testing.assert_array_equal(E4M3_VALUES, expected)
        np.testing.assert_array_equal(np.signbit(E4M3_VALUES[FINITE]), np.signbit(expected[FINITE]))


def test_only_0x7f_and_0xff_are_nan_and_the_largest_is_448() -> None:
    np.testing.assert_array_equal(CODES[np.isnan(E4M3_VALUES)], [0x7F, 0xFF])
    assert np.nanmax(E4M3_VALUES) == 448


def test_every_finite_code_encodes_to_itself() -> None:
    np.testing.assert_array_equal(e4m3.encode(E4M3_VALUES[FINITE]), FINITE)


def test_ties_saturation_and_signed_zero() -> None:
    values = np.array([0.0, -0.0, 2**-10, 3 * 2**-10, 17.0, 19.0, 448.0, 1e300, -480.0, -(2**-11)])
    np.testing.assert_array_equal(e4m3.encode(values), [0x00, 0x80, 0x00, 0x02, 0x58, 0x5A, 0x7E, 0x7E, 0xFE, 0x80])


def test_encode_agrees_with_ml_dtypes_on_and_around_every_midpoint() -> None:
    ascending = np.sort(E4M3_VALUES[FINITE])
    middle = (ascending[1:] + ascending[:-1]) / 2
    values = np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
    oracle = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    # ml_dtypes rounds doubles by way of float32, which moves the neighbours of a midpoint onto it: compare those in
    # the direction that they must go.
    np.testing.assert_array_equal(e4m3.encode(middle), oracle[: middle.size])
    above, below = e4m3.encode(values[middle.size : 2 * middle.size]), e4m3.encode(values[2 * middle.size :])
    np.testing.assert_array_equal(E4M3_VALUES[above], ascending[1:])
    np.testing.assert_array_equal(E4M3_VALUES[below], ascending[:-1])
