"""The reference codec against ml_dtypes; the fast casts are tested against the codec in test_casts."""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from v4quant.numerics import codec
from v4quant.numerics.check import CastCheck
from v4quant.numerics.errors import NonFiniteError


def powers(
    scale_e8m0: npt.NDArray[np.uint8], rows: int, columns: int, shape: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """E8M0 scales by ml_dtypes, spread over their blocks by Kronecker product."""
    scale = scale_e8m0.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return np.kron(scale, np.ones((rows, columns)))[: shape[0], : shape[1]]


def test_fp4_decodes_as_ml_dtypes_says_under_every_scale() -> None:
    packed = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (16, 1))[:255]
    scale = np.arange(255, dtype=np.uint8)[:, None]
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(255, 32)
    expected = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * powers(scale, 1, 32, (255, 32))
    decoded = codec.decode_fp4(packed, scale)
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(expected))


def test_fp8_decodes_as_ml_dtypes_says_in_cut_blocks() -> None:
    random = np.random.default_rng(7)
    codes = random.integers(0, 0x7F, (200, 300)).astype(np.uint8) | (random.integers(0, 2, (200, 300)) << 7).astype(
        np.uint8
    )
    scale = random.integers(0, 255, (2, 3)).astype(np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * powers(scale, 128, 128, codes.shape)
    np.testing.assert_array_equal(codec.decode_fp8(codes, scale), expected)
    as_float32 = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
    np.testing.assert_array_equal(codec.decode_fp8_f32(codes, as_float32), expected)


def test_float32_scales_that_are_no_powers_of_two_are_exact_in_float64() -> None:
    codes = np.array([[0x7E, 0x01, 0x80]], np.uint8)
    scale = np.array([[0.1]], np.float32)
    expected = [[448 * float(scale[0, 0]), 2**-9 * float(scale[0, 0]), -0.0]]
    np.testing.assert_array_equal(codec.decode_fp8_f32(codes, scale), expected)


def test_decoding_refuses_what_is_not_finite() -> None:
    codes = np.zeros((2, 32), np.uint8)
    nan_scale = np.array([[127], [255]], np.uint8)
    with pytest.raises(NonFiniteError, match=r"scale\[1, 0\] is NaN"):
        codec.decode_fp4(codes[:, :16], nan_scale)
    with pytest.raises(NonFiniteError, match=r"scale\[0, 0\] is NaN"):
        codec.decode_fp8(codes, nan_scale[1:])
    with pytest.raises(NonFiniteError, match=r"scale\[0, 0\] is 0.0"):
        codec.decode_fp8_f32(codes, np.zeros((1, 1), np.float32))
    codes[1, 5] = 0xFF
    with pytest.raises(NonFiniteError, match=r"weight\[1, 5\] is NaN"):
        codec.decode_fp8(codes, nan_scale[:1])
    with pytest.raises(NonFiniteError, match=r"weight\[1, 5\] is NaN"):
        codec.decode_fp8_f32(codes, np.ones((1, 1), np.float32))
    with pytest.raises(NonFiniteError, match=r"weight\[0, 1\] is Inf"):
        codec.decode_bf16(np.array([[0, 0x7F80]], np.uint16))
    with pytest.raises(NonFiniteError, match=r"weight\[0, 1\] is nan"):
        codec.encode_bf16_float64(np.array([[0, np.nan]]), np.zeros((1, 2), np.uint16))


def test_fp4_groups_are_scaled_by_the_rule_and_rounded_to_even() -> None:
    values = np.zeros((2, 64))
    values[0, :4] = [3.0, 0.25, -0.25, 2.6]  # amax 3: scale 1/2
    values[1, 32:35] = [6.5, 2.5, -0.0]  # amax 6.5: scale 2
    packed, scale = np.empty((2, 32), np.uint8), np.empty((2, 2), np.uint8)
    check = codec.encode_fp4_float64(values, packed, scale)
    np.testing.assert_array_equal(scale, [[126, 1], [1, 128]])
    np.testing.assert_array_equal(codec.decode_fp4(packed, scale)[0, :4], [3.0, 0.25, -0.25, 3.0])
    decoded = codec.decode_fp4(packed, scale)[1, 32:35]
    np.testing.assert_array_equal(decoded, [6.0, 2.0, -0.0])  # 3.25 -> 3, 1.25 -> 1
    assert np.signbit(decoded[2])
    assert check == CastCheck(inexact=3)


def test_fp8_blocks_are_scaled_by_the_rule() -> None:
    values = np.zeros((130, 129))
    values[0, 0], values[127, 127], values[129, 128] = 448.0, 17.0, 449.0
    codes, scale = np.empty(values.shape, np.uint8), np.empty((2, 2), np.uint8)
    check = codec.encode_fp8_float64(values, codes, scale)
    np.testing.assert_array_equal(scale, [[127, 1], [1, 128]])
    assert (codes[0, 0], codes[127, 127], codes[129, 128]) == (0x7E, 0x58, 0x76)
    assert check == CastCheck(inexact=2)


def test_a_given_scale_is_used_exactly_where_it_reproduces_the_values() -> None:
    values = np.zeros((1, 128))
    values[0, [0, 32, 64]] = [1.0, 1.0, 1.0]
    values[0, 33] = 0.5
    packed, scale = np.empty((1, 64), np.uint8), np.empty((1, 4), np.uint8)
    like = np.array([[128, 128, 255, 9]], np.uint8)
    check = codec.encode_fp4_float64(values, packed, scale, like)
    # 1.0 is 0.5 x 2; 0.5 is no multiple of 1.0; 255 is no scale; zeros are zeros under any.
    np.testing.assert_array_equal(scale, [[128, 125, 125, 9]])
    np.testing.assert_array_equal(codec.decode_fp4(packed, scale), values)
    assert check == CastCheck()


def test_what_is_too_large_for_bf16_saturates_and_counts() -> None:
    bits = np.empty((1, 3), np.uint16)
    check = codec.encode_bf16_float64(np.array([[1e39, 1.0, 2.0**-140]]), bits)
    np.testing.assert_array_equal(bits, [[0x7F7F, 0x3F80, 0]])
    assert check == CastCheck(inexact=2)


def test_a_lost_sign_of_zero_is_counted() -> None:
    check = codec.compare(np.array([-0.0, 0.0, -1.0]), np.array([0.0, 0.0, -0.0]))
    assert check == CastCheck(inexact=2, negative_zeros_lost=1)


def test_checks_merge() -> None:
    merged = CastCheck(1, 2, None).merged(CastCheck(10, 20, 3)).merged(CastCheck(worst_spread=1))
    assert merged == CastCheck(11, 22, 3)
    assert CastCheck().merged(CastCheck()).worst_spread is None
