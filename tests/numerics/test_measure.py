import math

import numpy as np
import pytest

from v4quant.numerics.measure import RoundingMeter


def test_errors_of_a_worked_example() -> None:
    meter = RoundingMeter()
    meter.add(np.array([[1.0, -2.0], [4.0, 0.0]]), np.array([[1.0, -2.5], [3.0, 0.0]]))
    error = meter.result()
    assert (error.elements, error.changed, error.changed_share) == (4, 2, 0.5)
    assert error.max_relative == 0.25
    assert error.rms_relative == pytest.approx(math.sqrt((0.25 + 1) / 21), rel=1e-15)
    assert error.sqnr_db == pytest.approx(10 * math.log10(21 / 1.25), rel=1e-15)


def test_a_lost_sign_of_zero_is_a_change_without_an_error() -> None:
    meter = RoundingMeter()
    meter.add(np.array([-0.0, 0.0, 1.0]), np.array([0.0, 0.0, 1.0]))
    assert meter.result().changed == 1
    assert meter.result().rms_relative == 0
    assert meter.result().sqnr_db == math.inf


def test_chunks_give_the_whole() -> None:
    random = np.random.default_rng(5)
    source = random.standard_normal((64, 100))
    output = source.astype(np.float32).astype(np.float64)
    expected_rms = np.linalg.norm(output - source) / np.linalg.norm(source)
    meter = RoundingMeter()
    for rows in (slice(0, 10), slice(10, 30), slice(30, 64)):
        meter.add(source[rows], output[rows])
    error = meter.result()
    assert (error.elements, error.changed) == (6400, int(np.count_nonzero(source != output)))
    assert error.rms_relative == pytest.approx(expected_rms, rel=1e-12)
    assert error.max_relative == np.max(np.abs((output - source) / source))


def test_nothing_and_zeros() -> None:
    assert RoundingMeter().result().changed_share == 0
    meter = RoundingMeter()
    meter.add(np.zeros(3), np.zeros(3))
    assert meter.result().rms_relative == 0
    meter.add(np.zeros(1), np.ones(1))
    assert meter.result().rms_relative == math.inf
    assert meter.result().max_relative == 0


def test_float32_gives_the_numbers_of_float64() -> None:
    source, output = np.array([1.5, -3.0], np.float32), np.array([1.0, -3.0], np.float32)
    single, double = RoundingMeter(), RoundingMeter()
    single.add(source, output)
    double.add(source.astype(np.float64), output.astype(np.float64))
    assert single.result() == double.result()


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"output is \[2\], expected \[3\]"):
        RoundingMeter().add(np.zeros(3), np.zeros(2))
