import ml_dtypes
import numpy as np
import torch

from v4quant.numerics import e8m0
from v4quant.numerics.e8m0 import E8M0_VALUES

BYTES = np.arange(256, dtype=np.uint8)


def test_every_byte_has_the_value_that_ml_dtypes_and_torch_give() -> None:
    oracle = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    by_torch = torch.from_numpy(BYTES.copy()).view(torch.float8_e8m0fnu).to(torch.float64).numpy()
    np.testing.assert_array_equal(E8M0_VALUES, oracle)
    np.testing.assert_array_equal(E8M0_VALUES, by_torch)


def test_every_byte_comes_back_from_float32() -> None:
    scale = E8M0_VALUES[:255].astype(np.float32)
    np.testing.assert_array_equal(e8m0.from_float32(scale), BYTES[:255])


def test_what_is_no_power_of_two_in_range_has_no_byte() -> None:
    for value in (1.5, np.nextafter(np.float32(1), np.float32(2)), 2.0**-128, 2.0**-127 * 1.5, 2.0**-149, 0.0):
        assert e8m0.from_float32(np.array([[1.0, value]], np.float32)) is None, value
