"""The assertions fail where they must, and say where."""

from pathlib import Path

import numpy as np
import pytest

from v4quant.testing.asserts import assert_bitwise_equal, assert_same_checkpoint


def test_equal_arrays_pass() -> None:
    nan = np.array([[0x7FC00001, 0x80000000]], np.uint32).view(np.float32)
    assert_bitwise_equal(nan, nan.copy())
    assert_bitwise_equal(nan[:, ::-1], nan[:, ::-1].copy())
    assert_bitwise_equal(b"", b"")
    assert_bitwise_equal(np.array(1.5), np.array(1.5))


def test_names_count_coordinate_and_both_values() -> None:
    expected = np.zeros((3, 4), np.float32)
    actual = expected.copy()
    actual[1, 2] = -0.0
    actual[2, 3] = 1.0
    with pytest.raises(AssertionError) as failure:
        assert_bitwise_equal(actual, expected)
    assert str(failure.value) == (
        "2 of 12 elements differ, first at [1, 2]: -0.0 (0x80000000), expected 0.0 (0x00000000)"
    )


def test_bytes_dtypes_and_shapes_count() -> None:
    with pytest.raises(AssertionError, match=r"1 of 2 elements differ, first at \[1\]: 3 \(0x03\), expected 2"):
        assert_bitwise_equal(b"\x01\x03", b"\x01\x02")
    with pytest.raises(AssertionError, match="dtype is int32, expected float32"):
        assert_bitwise_equal(np.zeros(2, np.int32), np.zeros(2, np.float32))
    with pytest.raises(AssertionError, match=r"shape is \[2, 1\], expected \[2\]"):
        assert_bitwise_equal(np.zeros((2, 1)), np.zeros(2))


def test_checkpoints_are_compared_by_files_and_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "inference").mkdir(parents=True)
        (tmp_path / name / "inference" / "config.json").write_bytes(b"{}")
    assert_same_checkpoint(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "inference" / "config.json").write_bytes(b"[]")
    with pytest.raises(AssertionError, match=r"inference/config\.json"):
        assert_same_checkpoint(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "more").write_bytes(b"")
    with pytest.raises(AssertionError, match=r"lacks \[\] and has \['more'\] besides"):
        assert_same_checkpoint(tmp_path / "a", tmp_path / "b")
