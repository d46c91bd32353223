"""Every cast between any two encodings of any format: it decodes to the same values, or counts each that differs.

Expected values come from the oracle (ml_dtypes and a search over all numbers of a format), never from the package.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.formats import oracle
from v4quant.encodings import BF16, FP4, FP8, FP8_F32_SCALE, Encoding
from v4quant.formats import FORMATS
from v4quant.formats.cast import Scratch, Weight, cast, check_finite, codes_dtype, decode, scale_dtype
from v4quant.formats.risk import rounding_risk
from v4quant.numerics.check import CastCheck
from v4quant.numerics.errors import NonFiniteError

Array = npt.NDArray[Any]

ENCODINGS = list(dict.fromkeys(e for f in FORMATS.values() for e in (f.scheme.expert, f.scheme.dense)))
PAIRS = list(itertools.permutations(ENCODINGS, 2))
SHAPES = [(1, 32), (128, 128), (130, 160), (257, 288), (1, 1), (127, 77), (129, 257)]
# Lowest and highest scale byte (for BF16: exponent field) of the content of one weight.
RANGES = {"even": (120, 120), "trained": (118, 124), "wide": (90, 140), "least": (0, 2), "largest": (252, 254)}
ORACLE_CODES = {"I8": np.dtype(np.int8), "F8_E4M3": oracle.E4M3, "BF16": oracle.BF16}
GRIDS = {"I8": oracle.E2M1, "F8_E4M3": oracle.E4M3, "BF16": oracle.BF16}


def pair_name(value: object) -> str | None:
    return value.name if isinstance(value, Encoding) else None


def expected_values(weight: Weight) -> oracle.Float64:
    codes = weight.codes.view(ORACLE_CODES[weight.encoding.weight_dtype])
    return oracle.decode(codes, oracle_scale(weight))


def oracle_scale(weight: Weight) -> Array | None:
    if weight.scale is None or weight.scale.dtype == np.float32:
        return weight.scale
    scale: Array = weight.scale.view(oracle.E8M0)
    return scale


def random_weight(encoding: Encoding, shape: tuple[int, int], exponents: tuple[int, int]) -> Weight:
    """Any codes but NaN, zeros of both signs among them, in blocks whose scales spread over a range."""
    random = np.random.default_rng([*shape, *exponents])
    low, high = exponents
    if encoding == BF16:
        field = random.integers(low, high, shape, endpoint=True) << 7
        bits = field | random.integers(0, 128, shape) | (random.integers(0, 2, shape) << 15)
        bits[random.random(shape) < 0.1] &= 0x8000
        return Weight(encoding, bits.astype(np.uint16))
    codes = random.integers(0, 256, encoding.storage_shape(shape)).astype(np.uint8)
    if encoding.weight_dtype == "F8_E4M3":
        codes[(codes & 0x7F) == 0x7F] = 0x80
    scale_e8m0 = random.integers(low, high, encoding.scale_shape(shape), endpoint=True)
    if encoding.scale_dtype == "F32":
        return Weight(encoding, codes, np.ldexp(np.float32(1), scale_e8m0 - 127).astype(np.float32))
    return Weight(encoding, codes, scale_e8m0.astype(np.uint8))


def poisoned(encoding: Encoding, shape: tuple[int, int]) -> Weight:
    """A weight to be overwritten, full of NaN: what a cast forgets to write shows."""
    codes = np.full(encoding.storage_shape(shape), np.iinfo(codes_dtype(encoding)).max, codes_dtype(encoding))
    if encoding.block is None:
        return Weight(encoding, codes)
    nan = np.nan if encoding.scale_dtype == "F32" else 0xFF
    return Weight(encoding, codes, np.full(encoding.scale_shape(shape), nan, scale_dtype(encoding)))


def cast_to(source: Weight, target: Encoding, like: Array | None = None) -> tuple[Weight, CastCheck]:
    rows, columns = source.encoding.logical_shape(source.codes.shape)
    filled = poisoned(target, (rows, columns))
    return filled, cast(source, filled, Scratch(), like)


def assert_nearest_and_counted(source: Weight, target: Weight, check: CastCheck) -> None:
    """Every output value is the nearest one under its scale, and the check counts exactly those that differ."""
    wanted, found = expected_values(source), expected_values(target)
    scale = oracle_scale(target)
    codes = ORACLE_CODES[target.encoding.weight_dtype]
    unit = np.ones_like(wanted) if scale is None else oracle.spread(scale, codes, wanted.shape)
    nearest = oracle.nearest(wanted / unit, GRIDS[target.encoding.weight_dtype]) * unit
    wrong = oracle.differs(found, nearest)
    assert not wrong.any(), f"{np.argwhere(wrong)[0]}: {found[wrong][0]} is not the nearest of {wanted[wrong][0]}"
    assert check.inexact == np.count_nonzero(oracle.differs(found, wanted))
    assert check.negative_zeros_lost == 0


@pytest.mark.parametrize("exponents", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=pair_name)
def test_values_are_the_same_or_counted(source: Encoding, target: Encoding, exponents: tuple[int, int]) -> None:
    for shape in SHAPES:
        if shape[1] % 32 and FP4 in (source, target):
            continue
        weight = random_weight(source, shape, exponents)
        filled, check = cast_to(weight, target)
        assert_nearest_and_counted(weight, filled, check)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=pair_name)
def test_pairs_without_a_risk_never_round(source: Encoding, target: Encoding) -> None:
    inexact = 0
    for exponents in (RANGES["trained"], RANGES["wide"]):
        weight = random_weight(source, (130, 160), exponents)
        inexact += cast_to(weight, target)[1].inexact
    # F32 scales that are powers of two are as harmless as E8M0 ones; other scales have tests of their own below.
    may_round = rounding_risk(source, target) != "" and (source, target) not in [
        (FP8_F32_SCALE, FP8),
        (FP8_F32_SCALE, BF16),
    ]
    assert (inexact > 0) == may_round


@pytest.mark.parametrize("encoding", ENCODINGS, ids=pair_name)
def test_decode_is_exact(encoding: Encoding) -> None:
    for exponents in RANGES.values():
        weight = random_weight(encoding, (130, 160), exponents)
        assert not oracle.differs(decode(weight), expected_values(weight)).any()


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=pair_name)
@pytest.mark.parametrize("sign", [0, 1])
def test_zeros_keep_their_signs(source: Encoding, target: Encoding, sign: int) -> None:
    weight = random_weight(source, (130, 160), (120, 120))
    weight.codes[...] = {"I8": 0x88, "F8_E4M3": 0x80, "BF16": 0x8000}[source.weight_dtype] * sign
    filled, check = cast_to(weight, target)
    assert (check.inexact, check.negative_zeros_lost) == (0, 0)
    assert not oracle.differs(expected_values(filled), np.full((130, 160), -0.0 if sign else 0.0)).any()


BAD_WEIGHTS: dict[str, list[float]] = {
    "F8_E4M3": [0x7F, 0xFF],
    "BF16": [0x7F80, 0xFF80, 0x7F81, 0xFFFF],
    "I8": [],  # FP4 has no NaN
}
BAD_SCALES: dict[str, list[float]] = {"F8_E8M0": [0xFF], "F32": [np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0], "": []}


@pytest.mark.parametrize("source", ENCODINGS, ids=pair_name)
def test_what_is_not_finite_is_refused_with_its_coordinate(source: Encoding) -> None:
    """By every cast, by decoding, and by the check that copies get."""
    for in_scale, bad in enumerate((BAD_WEIGHTS[source.weight_dtype], BAD_SCALES[source.scale_dtype])):
        for value in bad:
            weight = random_weight(source, (130, 160), (120, 120))
            array = weight.parts()[in_scale]
            row, column = array.shape[0] - 1, array.shape[1] - 2 if array.shape[1] > 2 else 0
            array[row, column] = value
            refused: list[Callable[[], object]] = [
                partial(cast_to, weight, target) for target in ENCODINGS if target != source
            ]
            refused += [partial(check_finite, weight), partial(decode, weight)]
            for refuse in refused:
                with pytest.raises(NonFiniteError) as caught:
                    refuse()
                error = caught.value
                assert (error.row, error.column, error.in_scale) == (row, column, bool(in_scale))


@pytest.mark.parametrize("exponent", [-149, -140, -127, -20, 0, 100, 127])
@pytest.mark.parametrize("target", [FP4, FP8, BF16], ids=pair_name)
def test_f32_scales_that_are_no_powers_of_two(target: Encoding, exponent: int) -> None:
    """From the least subnormal scale to the largest: nearest values, each change counted."""
    weight = random_weight(FP8_F32_SCALE, (257, 288), (120, 120))
    factors = np.random.default_rng(5).uniform(1, 1.99, weight.scales.shape)
    weight.scales[...] = np.ldexp(factors, exponent).astype(np.float32)
    filled, check = cast_to(weight, target)
    assert_nearest_and_counted(weight, filled, check)
    assert check.inexact > 0


@pytest.mark.parametrize("target", [FP4, FP8, BF16], ids=pair_name)
def test_an_odd_f32_scale_is_exact_where_the_values_fit(target: Encoding) -> None:
    """1, 2 and 4 times 1.5 are E2M1 values, so a scale of 1.5 loses nothing, whatever its mantissa."""
    codes = np.resize(np.array([0x38, 0x40, 0x48, 0xB8, 0x00, 0x80], np.uint8), (130, 160))
    weight = Weight(FP8_F32_SCALE, codes, np.full((2, 2), 1.5, np.float32))
    filled, check = cast_to(weight, target)
    assert check.inexact == 0
    assert_nearest_and_counted(weight, filled, check)


def scaled_original(target: Encoding, grid: oracle.Float64) -> Weight:
    """A weight whose scales are not the rule's: up to three powers above it, any at all over zeros."""
    random = np.random.default_rng(17)
    shape = (257, 288)
    original = poisoned(target, shape)
    byte = random.integers(118, 122, target.scale_shape(shape)).astype(np.uint8)
    values = random.choice(grid, shape) * random.choice([-1, 1], shape)
    values[:128, :128] = np.copysign(0.0, values[:128, :128])
    if target == FP4:
        codes = values.astype(oracle.E2M1).view(np.uint8)
        original.codes[...] = codes[:, ::2] | codes[:, 1::2] << 4
    else:
        original.codes[...] = values.astype(oracle.E4M3).view(np.uint8)
    byte[0, 0] = 200
    original.scales[...] = byte if target.scale_dtype == "F8_E8M0" else np.ldexp(1.0, byte.astype(int) - 127)
    return original


@pytest.mark.parametrize(("middle", "target"), [pair for pair in PAIRS if pair[1].block is not None], ids=pair_name)
def test_like_scale_brings_the_original_back(middle: Encoding, target: Encoding) -> None:
    original = scaled_original(target, np.array([0, 0.5, 1, 1.5, 2, 3]))
    there, check = cast_to(original, middle)
    assert check.inexact == 0
    without, check = cast_to(there, target)
    assert check.inexact == 0
    if {middle, target} != {FP8, FP8_F32_SCALE}:  # those two share their scales
        assert not np.array_equal(without.scales, original.scales)  # the rule alone would not do it
    back, check = cast_to(there, target, original.scales)
    assert check.inexact == 0
    np.testing.assert_array_equal(back.codes, original.codes)
    np.testing.assert_array_equal(back.scales, original.scales)


@pytest.mark.parametrize("like_byte", [0, 1, 127, 252, 253, 254, 255])
@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[1].block is not None], ids=pair_name)
def test_like_scales_that_do_not_fit_change_no_value(source: Encoding, target: Encoding, like_byte: int) -> None:
    like: Array = np.full(target.scale_shape((130, 160)), like_byte, np.uint8)
    if target.scale_dtype == "F32":
        like = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)[like]
    for exponents in (RANGES["trained"], RANGES["wide"]):
        weight = random_weight(source, (130, 160), exponents)
        filled, check = cast_to(weight, target, like)
        assert_nearest_and_counted(weight, filled, check)
        without, check_without = cast_to(weight, target)
        assert check.inexact == check_without.inexact
        assert not oracle.differs(expected_values(filled), expected_values(without)).any()


def test_scratch_is_used_again_without_leaving_a_trace() -> None:
    scratch = Scratch()
    for shape in ((257, 288), (1, 32), (130, 160)):
        for source, target in PAIRS:
            weight = random_weight(source, shape, RANGES["trained"])
            filled = scratch.weight("target", target, shape)
            for part in filled.parts():
                part.view(np.uint8)[...] = 0xFF
            check = cast(weight, filled, scratch)
            expected, expected_check = cast_to(weight, target)
            assert check == expected_check
            for part, wanted in zip(filled.parts(), expected.parts(), strict=True):
                np.testing.assert_array_equal(part, wanted)
