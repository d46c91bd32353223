"""The fast casts: exhaustive over small domains against ml_dtypes, property tests against the reference codec."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4quant.numerics import casts, codec, e2m1
from v4quant.numerics.casts import (
    CastCheck,
    NonFiniteError,
    bf16_to_fp4,
    bf16_to_fp8,
    fp4_to_bf16,
    fp4_to_fp8,
    fp8_to_bf16,
)

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

BF16_FINITE = np.array([bits for bits in range(65536) if bits & 0x7FFF < 0x7F80], np.uint16)
E4M3_FINITE = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)


def poisoned(shape: tuple[int, ...], dtype: type[np.generic] = np.uint8) -> Array:
    """Memory full of 0xAA: what a cast forgets to write shows."""
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = 0xAA
    return array


def block_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (-(-shape[0] // 128), -(-shape[1] // 128))


def to_bf16(packed: Array, scale: Array) -> tuple[Array, CastCheck]:
    out = poisoned((packed.shape[0], packed.shape[1] * 2), np.uint16)
    return out, fp4_to_bf16(packed, scale, out)


def to_fp8(packed: Array, scale: Array) -> tuple[Array, Array, CastCheck]:
    out = poisoned((packed.shape[0], packed.shape[1] * 2))
    out_scale = poisoned(block_shape(out.shape))
    return out, out_scale, fp4_to_fp8(packed, scale, out, out_scale)


def from_fp8(codes: Array, scale: Array) -> tuple[Array, CastCheck]:
    out = poisoned(codes.shape, np.uint16)
    return out, fp8_to_bf16(codes, scale, out)


def encode_fp4(bits: Array, like: Array | None = None) -> tuple[Array, Array, CastCheck]:
    out, out_scale = poisoned((bits.shape[0], bits.shape[1] // 2)), poisoned((bits.shape[0], bits.shape[1] // 32))
    return out, out_scale, bf16_to_fp4(bits, out, out_scale, like)


def encode_fp8(bits: Array, like: Array | None = None) -> tuple[Array, Array, CastCheck]:
    out, out_scale = poisoned(bits.shape), poisoned(block_shape(bits.shape))
    return out, out_scale, bf16_to_fp8(bits, out, out_scale, like)


def assert_same(actual: Float64, expected: Float64) -> None:
    """Equal values and equal signs of zero."""
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))


def bf16_values(bits: Array) -> Float64:
    values: Float64 = bits.view(ml_dtypes.bfloat16).astype(np.float64)
    return values


def e2m1_values(codes: Array) -> Float64:
    values: Float64 = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return values


def e4m3_values(codes: Array) -> Float64:
    values: Float64 = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return values


def powers(scale_e8m0: Array) -> Float64:
    values: Float64 = scale_e8m0.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return values


# Exhaustive


def test_fp4_to_bf16_for_every_code_and_scale() -> None:
    codes = np.tile(np.arange(32, dtype=np.uint8) % 16, (255, 1))
    scale = np.arange(255, dtype=np.uint8)[:, None]
    bits, check = to_bf16(e2m1.pack(codes), scale)
    exact = e2m1_values(codes) * powers(scale)
    assert_same(bf16_values(bits)[:253], exact[:253])
    # 4 and 6 at byte 253, 2 to 6 at byte 254 exceed BF16: its largest number, counted, never infinity.
    too_large = np.abs(exact) >= 2.0**128
    assert_same(
        bf16_values(bits), np.where(too_large, np.copysign(bf16_values(np.array([0x7F7F], np.uint16)), exact), exact)
    )
    assert check == CastCheck(inexact=int(np.count_nonzero(too_large)))
    assert check.inexact == 2 * 2 * (2 + 4)


@pytest.mark.parametrize("largest_byte", [254, 200, 60])
def test_fp4_to_fp8_for_every_code_and_offset(largest_byte: int) -> None:
    for spread in range(41):
        codes = np.zeros((2, 32), np.uint8)
        codes[0, 0] = 7
        codes[1] = np.arange(32) % 16
        scale = np.array([[largest_byte], [largest_byte - spread]], np.uint8)
        out, out_scale, check = to_fp8(e2m1.pack(codes), scale)
        assert out_scale == largest_byte - 6
        expected = e2m1_values(codes) * 2.0 ** (6.0 - np.array([[0], [spread]]))
        assert_same(e4m3_values(out), expected.astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
        assert check == CastCheck(int(np.count_nonzero(e4m3_values(out) != expected)), worst_spread=spread)
        assert (check.inexact == 0) == (spread <= casts.FP4_TO_FP8_SPREAD_BOUND)


@pytest.mark.parametrize(
    ("spread", "survivors"),
    [(14, {0, 0.5, 1, 1.5, 2, 3, 4, 6}), (15, {0, 1, 2, 3, 4, 6}), (16, {0, 2, 4, 6}), (17, {0, 4}), (18, {0})],
)
def test_small_groups_survive_if_they_hold_few_codes(spread: int, survivors: set[float]) -> None:
    # facts/model.md, section 7: which magnitudes stand which spread.
    for code in range(16):
        codes = np.zeros((2, 32), np.uint8)
        codes[0, 0], codes[1] = 1, code
        scale = np.array([[150], [150 - spread]], np.uint8)
        out, _, check = to_fp8(e2m1.pack(codes), scale)
        value = abs(e2m1_values(codes)[1, 0])
        assert check.inexact == (0 if value in survivors else 32)
        assert check.worst_spread == (spread if value else 0)
        assert np.all(np.signbit(e4m3_values(out))[1] == (code >= 8))


def test_groups_of_zeros_do_not_cost_exactness() -> None:
    codes = np.zeros((3, 64), np.uint8)
    codes[0, 1], codes[1, 33] = 3, 9  # odd columns: the high nibbles
    codes[2, 5] = 8
    # Zeros under the largest and the least scales; the non-zero groups lie 2^14 apart.
    scale = np.array([[120, 200], [3, 106], [254, 0]], np.uint8)
    out, out_scale, check = to_fp8(e2m1.pack(codes), scale)
    assert check == CastCheck(worst_spread=14)
    assert out_scale == 120 - 6
    assert_same(e4m3_values(out) * powers(out_scale), codec.decode_fp4(e2m1.pack(codes), scale))


def test_blocks_of_zeros_and_of_tiny_scales_become_fp8() -> None:
    codes = np.zeros((1, 384), np.uint8)
    codes[0, 3] = 8
    codes[0, 128:256] = np.arange(128) % 16
    scale = np.array([[0, 0, 0, 0, 0, 1, 2, 6, 9, 250, 1, 1]], np.uint8)
    out, out_scale, check = to_fp8(e2m1.pack(codes), scale)
    assert check == CastCheck(worst_spread=6)
    np.testing.assert_array_equal(out_scale, [[1, 1, 244]])
    assert_same(codec.decode_fp8(out, out_scale), codec.decode_fp4(e2m1.pack(codes), scale))


def test_fp8_to_bf16_for_every_code_and_scale() -> None:
    codes = np.zeros((2, 128 * 255), np.uint8)
    codes[0].reshape(255, 128)[:, :127] = E4M3_FINITE[:127]
    codes[1].reshape(255, 128)[:, :127] = E4M3_FINITE[127:]
    scale = np.arange(255, dtype=np.uint8)[None]
    bits, check = from_fp8(codes, scale)
    exact = e4m3_values(codes) * powers(scale).repeat(128, axis=1)
    codec.encode_bf16_float64(exact, expected_bits := poisoned(codes.shape, np.uint16))
    expected = bf16_values(expected_bits)
    assert_same(bf16_values(bits), expected)
    assert check == CastCheck(inexact=int(np.count_nonzero(expected != exact)))
    exact_bytes = np.all((expected == exact).reshape(2, 255, 128), axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(exact_bytes), np.arange(3, 247))  # facts/formats.md: -124 <= k <= 119


SCALE_BYTES = [0, 1, 2, 3, 4, 10, 11, 12, 100, 127, 200, 246, 247, 248, 252, 253, 254]


@pytest.mark.parametrize("byte", SCALE_BYTES)
def test_bf16_to_fp4_for_every_pattern(byte: int) -> None:
    scale = 2.0 ** (byte - 127.0)
    fitting = BF16_FINITE[np.abs(bf16_values(BF16_FINITE)) <= 6 * scale]
    # The first of each group is the largest BF16 number that fits, so that the rule gives this scale, if any can.
    largest = fitting[np.argmax(bf16_values(fitting))]
    bits = np.full((-(-fitting.size // 31), 32), largest, np.uint16)
    bits[:, 1:].flat[: fitting.size] = fitting
    out, out_scale, check = encode_fp4(bits)
    rule = byte if byte < 254 else 253
    assert np.all(out_scale == rule)
    scaled = bf16_values(bits) / 2.0 ** (rule - 127.0)
    expected = scaled.astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    assert_same(e2m1_values(e2m1.unpack(out)), expected)
    assert check == CastCheck(inexact=int(np.count_nonzero(expected != scaled)))


@pytest.mark.parametrize("byte", SCALE_BYTES)
def test_bf16_to_fp8_for_every_pattern(byte: int) -> None:
    scale = 2.0 ** (byte - 127.0)
    fitting = BF16_FINITE[np.abs(bf16_values(BF16_FINITE)) <= 448 * scale]
    largest = fitting[np.argmax(bf16_values(fitting))]
    bits = np.zeros((128, 128 * -(-fitting.size // (127 * 128))), np.uint16)
    bits[0, ::128] = largest
    bits[1:].reshape(-1)[: fitting.size] = fitting
    out, out_scale, check = encode_fp8(bits)
    rule = min(byte, 247)
    assert np.all(out_scale == rule)
    scaled = bf16_values(bits) / 2.0 ** (rule - 127.0)
    expected = scaled.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert_same(e4m3_values(out), expected)
    assert check == CastCheck(inexact=int(np.count_nonzero(expected != scaled)))


# Properties, against the reference codec

# Zeros, subnormals, least normals; ties of both formats near 1; the formats' maxima and what lies just above.
EDGES = np.frombuffer(
    bytes.fromhex(
        "0000 8000 0001 807F 0080 3E80 3F40 BFA0 3FE0 4020 4060 C0A0"
        "3F88 3F98 3A80 3B40 3BA0 40C0 40C1 43E0 43E1 7F7F FF7F 7F00"
    ),
    ">u2",
).astype(np.uint16)


@st.composite
def bf16_matrices(draw: st.DrawFn, column_step: int) -> Array:
    """Small matrices with cut blocks; magnitudes from one binade to all of BF16, with zeros and edges strewn in."""
    rows = draw(st.sampled_from([1, 3, 127, 128, 130]))
    columns = column_step * draw(st.integers(1, 288 // column_step))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    middle, width = draw(st.integers(0, 254)), draw(st.sampled_from([0, 1, 4, 12, 40, 254]))
    exponent = np.clip(random.integers(middle - width, middle + width, (rows, columns), endpoint=True), 0, 254)
    kept = draw(st.sampled_from([0x40, 0x60, 0x70, 0x7F]))  # few mantissa bits: values on a grid
    bits = (
        (exponent << 7)
        | (random.integers(0, 128, exponent.shape) & kept)
        | (random.integers(0, 2, exponent.shape) << 15)
    )
    bits = np.where(random.random(exponent.shape) < draw(st.sampled_from([0, 0.1, 0.99, 1])), bits & 0x8000, bits)
    strewn = random.random(exponent.shape) < draw(st.sampled_from([0, 0.01, 0.5]))
    matrix: Array = np.where(strewn, random.choice(EDGES, exponent.shape), bits).astype(np.uint16)
    return matrix


LIKES = st.sampled_from(["none", "random", "near", "constant"])


def like_scale(kind: str, rule: Array) -> Array | None:
    """Scales to offer: any bytes at all, the rule's own and up to three above and below, or one constant."""
    random = np.random.default_rng(int(rule.sum()))
    if kind == "random":
        return random.integers(0, 256, rule.shape).astype(np.uint8)
    if kind == "near":
        return np.clip(rule.astype(int) + random.integers(-3, 4, rule.shape), 0, 255).astype(np.uint8)
    return None if kind == "none" else np.full(rule.shape, 127, np.uint8)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(bf16_matrices(column_step=32), LIKES)
def test_bf16_to_fp4_agrees_with_the_codec(bits: Array, kind: str) -> None:
    values = codec.decode_bf16(bits)
    expected, expected_scale = (
        poisoned((bits.shape[0], bits.shape[1] // 2)),
        poisoned((bits.shape[0], bits.shape[1] // 32)),
    )
    codec.encode_fp4_float64(values, expected, expected_scale)
    like = like_scale(kind, expected_scale)
    check = codec.encode_fp4_float64(values, expected, expected_scale, like)
    out, out_scale, found = encode_fp4(bits, like)
    np.testing.assert_array_equal(out_scale, expected_scale)
    np.testing.assert_array_equal(out, expected)
    assert found == check


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from([1, 32]).flatmap(bf16_matrices), LIKES)
def test_bf16_to_fp8_agrees_with_the_codec(bits: Array, kind: str) -> None:
    values = codec.decode_bf16(bits)
    expected, expected_scale = poisoned(bits.shape), poisoned(block_shape(bits.shape))
    codec.encode_fp8_float64(values, expected, expected_scale)
    like = like_scale(kind, expected_scale)
    check = codec.encode_fp8_float64(values, expected, expected_scale, like)
    out, out_scale, found = encode_fp8(bits, like)
    np.testing.assert_array_equal(out_scale, expected_scale)
    np.testing.assert_array_equal(out, expected)
    assert found == check


@st.composite
def fp4_weights(draw: st.DrawFn) -> tuple[Array, Array]:
    """FP4 codes with zeros strewn in, in scales that vary little, much, or over all of E8M0."""
    rows, groups = draw(st.sampled_from([1, 5, 128, 131])), draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes = random.integers(0, 16, (rows, groups * 32)).astype(np.uint8)
    zero_groups = random.random((rows, groups)) < draw(st.sampled_from([0, 0.2, 1]))
    codes[zero_groups.repeat(32, axis=1)] &= 8
    middle, width = draw(st.integers(0, 254)), draw(st.sampled_from([0, 3, 6, 14, 20, 254]))
    scale = np.clip(random.integers(middle - width, middle + width, (rows, groups), endpoint=True), 0, 254)
    return e2m1.pack(codes), scale.astype(np.uint8)


def block_scale_and_spread(codes: Array, scale: Array) -> tuple[Array, int]:
    """What fp4_to_fp8 promises for block scales and the worst spread, in plain Python."""
    worst, block_scale = 0, np.empty(block_shape(codes.shape), np.uint8)
    for row, column in np.ndindex(*block_scale.shape):
        rows, groups = slice(row * 128, row * 128 + 128), slice(column * 4, column * 4 + 4)
        every = scale[rows, groups].astype(int)
        holds_value = (codes.reshape(*scale.shape, 32)[rows, groups] & 7).any(axis=2)
        used = every[holds_value]
        far = every.max() - every.min() > 14
        largest = used.max() if far and used.size else every.max()
        block_scale[row, column] = max(largest - 6, 1)
        worst = max(worst, largest - used.min() if used.size else 0)
    return block_scale, worst


@settings(max_examples=150, deadline=None, derandomize=True)
@given(fp4_weights())
def test_fp4_casts_give_the_nearest_values_and_count_the_others(weight: tuple[Array, Array]) -> None:
    packed, scale = weight
    source = codec.decode_fp4(packed, scale)
    bits, check = to_bf16(packed, scale)
    assert check == codec.compare(source, bf16_values(bits))
    assert check.inexact == 0 or scale.max() > 252
    codes, block_scale, check = to_fp8(packed, scale)
    decoded = codec.decode_fp8(codes, block_scale)
    expected = codec.compare(source, decoded)
    assert (check.inexact, check.negative_zeros_lost) == (expected.inexact, expected.negative_zeros_lost)
    expected_scale, worst = block_scale_and_spread(e2m1.unpack(packed), scale)
    np.testing.assert_array_equal(block_scale, expected_scale)
    assert check.worst_spread == worst
    assert check.inexact == 0 or worst > casts.FP4_TO_FP8_SPREAD_BOUND
    unit = powers(block_scale).repeat(128, axis=0)[: source.shape[0]].repeat(128, axis=1)[:, : source.shape[1]]
    assert_same(decoded, (source / unit).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * unit)
    if check.inexact == 0 and scale.max() <= 252:
        again, back = from_fp8(codes, block_scale)
        assert back.inexact == 0
        np.testing.assert_array_equal(again, bits)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(fp4_weights())
def test_fp4_comes_back_from_bf16(weight: tuple[Array, Array]) -> None:
    packed, scale = weight
    scale = np.minimum(scale, 252)
    bits, _ = to_bf16(packed, scale)
    again, again_scale, check = encode_fp4(bits)
    assert check == CastCheck()
    assert_same(codec.decode_fp4(again, again_scale), codec.decode_fp4(packed, scale))
    again, again_scale, check = encode_fp4(bits, scale)
    assert check == CastCheck()
    np.testing.assert_array_equal(again, packed)
    np.testing.assert_array_equal(again_scale, scale)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from([(1, 32), (130, 160), (128, 256), (127, 77)]), st.integers(3, 246))
def test_fp8_comes_back_from_bf16(seed: int, shape: tuple[int, int], byte: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.choice(E4M3_FINITE, shape)
    codes[random.random(shape) < random.choice([0.0, 0.3, 1.0])] &= 0x87  # subnormals and zeros
    scale = np.clip(random.integers(byte - 4, byte + 5, block_shape(shape)), 3, 246).astype(np.uint8)
    bits, check = from_fp8(codes, scale)
    assert check == CastCheck()
    assert_same(bf16_values(bits), codec.decode_fp8(codes, scale))
    again, again_scale, check = encode_fp8(bits)
    assert check == CastCheck()
    assert_same(codec.decode_fp8(again, again_scale), codec.decode_fp8(codes, scale))
    again, again_scale, check = encode_fp8(bits, scale)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(again_scale, scale)


@pytest.mark.parametrize("byte", [200, 253, 254])
def test_given_scales_far_above_the_rule_are_used_where_they_fit(byte: int) -> None:
    like = np.array([[byte]], np.uint8)
    bits = np.zeros((1, 32), np.uint16)
    bits[0, :4] = (byte << 7) + np.array([-0x80, 0x7F80, 0, 0x40])  # 0.5, -0.5, 1, 1.5 x scale
    out, out_scale, check = encode_fp4(bits, like)
    assert check == CastCheck()
    assert out_scale == byte
    np.testing.assert_array_equal(e2m1.unpack(out)[0, :5], [1, 9, 2, 3, 0])
    bits[0, 4] = (byte - 9) << 7  # 2^-9 x scale, and zeros
    out, out_scale, check = encode_fp8(bits, like)
    assert check == CastCheck()
    assert out_scale == byte
    np.testing.assert_array_equal(out[0, :6], [0x30, 0xB0, 0x38, 0x3C, 0x01, 0x00])


# Refusals


@pytest.mark.parametrize(("row", "column"), [(0, 0), (129, 5), (200, 3)])
def test_nan_scales_are_refused_with_their_coordinate(row: int, column: int) -> None:
    packed, scale = np.zeros((201, 96), np.uint8), np.full((201, 6), 127, np.uint8)
    scale[row, column] = 255
    for cast in (to_bf16, to_fp8):
        with pytest.raises(NonFiniteError) as caught:
            cast(packed, scale)
        assert (caught.value.row, caught.value.column, caught.value.in_scale) == (row, column, True)
    codes = np.zeros((201 * 128, 1), np.uint8)
    with pytest.raises(NonFiniteError, match=rf"scale\[{row}, 0\] is NaN"):
        from_fp8(codes, scale[:, column : column + 1].copy())


@pytest.mark.parametrize("columns", [128, 160, 77])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("byte", [127, 0])
def test_nan_codes_are_refused_with_their_coordinate(columns: int, code: int, byte: int) -> None:
    for row, column in ((0, 0), (129, columns - 1)):
        codes = np.full((130, columns), 0x38, np.uint8)
        codes[row, column] = code
        with pytest.raises(NonFiniteError, match=rf"weight\[{row}, {column}\] is NaN \(E4M3 byte 0x{code:02X}\)"):
            from_fp8(codes, np.full(block_shape(codes.shape), byte, np.uint8))


@pytest.mark.parametrize("found", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
@pytest.mark.parametrize("neighbours", [0x0000, 0x0001, 0x3F80, 0x7F7F])
def test_nan_and_infinite_bf16_weights_are_refused_with_their_coordinate(found: int, neighbours: int) -> None:
    for encode in (encode_fp4, encode_fp8):
        for row, column in ((0, 0), (129, 159)):
            bits = np.full((130, 160), neighbours, np.uint16)
            bits[row, column] = bits[-1, -1] = found
            with pytest.raises(NonFiniteError, match=rf"weight\[{row}, {column}\] is .*0x{found:04X}"):
                encode(bits)
    bits = np.full((130, 205), neighbours, np.uint16)
    bits[129, 204] = found
    with pytest.raises(NonFiniteError, match=r"weight\[129, 204\]"):
        encode_fp8(bits)


def test_arrays_that_do_not_fit_are_refused() -> None:
    packed, scale = np.zeros((4, 16), np.uint8), np.zeros((4, 1), np.uint8)
    bits, codes, block = np.zeros((4, 32), np.uint16), np.zeros((4, 32), np.uint8), np.zeros((1, 1), np.uint8)
    read_only = bits.copy()
    read_only.flags.writeable = False
    wrong_out: Any = codes
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: fp4_to_bf16(packed, scale[:3], bits), r"scale_e8m0 is uint8 \[3, 1\], expected uint8 \[4, 1\]"),
        (lambda: fp4_to_bf16(packed, scale, wrong_out), r"out is uint8 \[4, 32\], expected uint16 \[4, 32\]"),
        (lambda: fp4_to_bf16(packed[:, :15], scale, bits), "not contiguous"),
        (lambda: fp4_to_bf16(np.zeros((4, 15), np.uint8), scale, bits), "multiple of 16 columns"),
        (lambda: fp4_to_bf16(packed[0], scale, bits), "1 dimensions, expected 2"),
        (lambda: fp4_to_bf16(packed, scale, read_only), "out is read-only"),
        (lambda: fp4_to_fp8(packed, scale, codes, scale), r"out_scale_e8m0 is uint8 \[4, 1\], expected uint8 \[1, 1\]"),
        (lambda: fp8_to_bf16(codes.view(np.int8), block, bits), "codes is int8"),
        (lambda: bf16_to_fp4(bits[:, :16].copy(), packed, scale), "multiple of 32 columns"),
        (lambda: bf16_to_fp4(bits, packed, scale, block), "like_scale is"),
        (lambda: bf16_to_fp8(bits, codes, block, scale), "like_scale is"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


# Use from threads, and compilation


def test_bands_in_threads_give_the_whole() -> None:
    random = np.random.default_rng(11)
    packed = random.integers(0, 256, (600, 128)).astype(np.uint8)
    scale = random.integers(100, 125, (600, 8)).astype(np.uint8)
    packed.flags.writeable = scale.flags.writeable = False
    whole, whole_scale, whole_check = to_fp8(packed, scale)
    bands = [slice(start, start + 128) for start in range(0, 600, 128)]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda band: to_fp8(packed[band], scale[band]), bands))
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), whole)
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), whole_scale)
    check = CastCheck()
    for part in parts:
        check = check.merged(part[2])
    assert check == whole_check


def test_importing_compiles_nothing() -> None:
    program = """
from v4quant.numerics import casts, fp4_kernels, fp8_kernels, measure
from numba.core.dispatcher import Dispatcher
kernels = [value for module in (fp4_kernels, fp8_kernels, measure) for value in vars(module).values()
           if isinstance(value, Dispatcher)]
assert len(kernels) > 8, kernels
assert not any(kernel.signatures for kernel in kernels)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
