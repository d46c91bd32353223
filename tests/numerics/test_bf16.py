import ml_dtypes
import numpy as np
import torch

from v4quant.numerics import bf16
from v4quant.numerics.bf16 import BF16_MAX

BITS = np.arange(65536, dtype=np.uint16)
FINITE = BITS[(BITS & 0x7FFF) < 0x7F80]


def test_every_finite_pattern_has_the_value_that_ml_dtypes_and_torch_give() -> None:
    values = bf16.decode(FINITE)
    np.testing.assert_array_equal(values, FINITE.view(ml_dtypes.bfloat16).astype(np.float64))
    by_torch = torch.from_numpy(FINITE.view(np.int16).copy()).view(torch.bfloat16).to(torch.float64).numpy()
    np.testing.assert_array_equal(values, by_torch)
    np.testing.assert_array_equal(np.signbit(values), FINITE >> 15)


def test_every_finite_pattern_encodes_to_itself() -> None:
    np.testing.assert_array_equal(bf16.encode(bf16.decode(FINITE)), FINITE)


def test_midpoints_go_to_the_even_pattern_and_neighbours_to_the_near_one() -> None:
    lower = np.arange(0x7F7F, dtype=np.uint16)
    middle = (bf16.decode(lower) + bf16.decode(lower + np.uint16(1))) / 2
    np.testing.assert_array_equal(bf16.encode(middle), lower + (lower & 1))
    np.testing.assert_array_equal(bf16.encode(np.nextafter(middle, 0)), lower)
    np.testing.assert_array_equal(bf16.encode(np.nextafter(middle, np.inf)), lower + 1)


def test_what_is_too_large_saturates() -> None:
    np.testing.assert_array_equal(bf16.encode(np.array([1e39, -1e300, BF16_MAX])), [0x7F7F, 0xFF7F, 0x7F7F])
