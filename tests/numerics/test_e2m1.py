import ml_dtypes
import numpy as np

from v4quant.numerics import e2m1
from v4quant.numerics.e2m1 import E2M1_VALUES


def test_every_code_has_the_value_that_ml_dtypes_gives() -> None:
    oracle = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    np.testing.assert_array_equal(E2M1_VALUES, oracle)
    np.testing.assert_array_equal(np.signbit(E2M1_VALUES), np.signbit(oracle))


def test_every_code_encodes_to_itself() -> None:
    np.testing.assert_array_equal(e2m1.encode(E2M1_VALUES), np.arange(16))


def test_ties_go_to_the_even_code_and_zero_keeps_its_sign() -> None:
    # The table of STYLE.md: the first row, nearest with ties to even.
    values = np.array([0, -0.0, 0.25, -0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    np.testing.assert_array_equal(e2m1.encode(values), [0, 8, 0, 8, 2, 2, 4, 4, 6, 6])


def test_what_is_too_large_saturates() -> None:
    np.testing.assert_array_equal(e2m1.encode(np.array([7.0, -1e300])), [7, 15])


def test_encode_agrees_with_ml_dtypes_around_every_threshold() -> None:
    # Neighbours in float32: ml_dtypes rounds doubles by way of float32.
    grid = np.arange(400, dtype=np.float32) / 64
    up, down = np.nextafter(grid, np.float32(np.inf)), np.nextafter(grid, np.float32(-np.inf))
    values = np.concatenate([grid, up, down, -grid, -up, -down]).astype(np.float64)
    oracle = values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
    np.testing.assert_array_equal(e2m1.encode(values), oracle)


def test_the_even_column_is_in_the_low_nibble() -> None:
    np.testing.assert_array_equal(e2m1.unpack(np.array([[0x21, 0xF8]], np.uint8)), [[1, 2, 8, 15]])
    np.testing.assert_array_equal(e2m1.pack(np.array([[1, 2, 8, 15]], np.uint8)), [[0x21, 0xF8]])


def test_pack_undoes_unpack_for_every_byte() -> None:
    packed = np.arange(256, dtype=np.uint8).reshape(2, 128)
    np.testing.assert_array_equal(e2m1.pack(e2m1.unpack(packed)), packed)
