from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from v4quant.numerics import finite
from v4quant.numerics.errors import NonFiniteError

# Check, an array that passes, what else passes, (what fails, its name).
CASES: list[tuple[Callable[[npt.NDArray[Any]], None], Any, list[Any], list[tuple[Any, str]]]] = [
    (finite.check_e8m0, np.uint8, [0, 254], [(255, "NaN (E8M0 byte 0xFF)")]),
    (finite.check_e4m3, np.uint8, [0x7E, 0x80, 0xFE], [(0x7F, "NaN (E4M3 byte 0x7F)"), (0xFF, "NaN (E4M3 byte 0xFF)")]),
    (
        finite.check_bf16,
        np.uint16,
        [0x7F7F, 0x8000, 0xFF7F],
        [(0x7F80, "Inf (BF16 0x7F80)"), (0xFF80, "-Inf (BF16 0xFF80)"), (0xFFC1, "NaN (BF16 0xFFC1)")],
    ),
    (
        finite.check_f32_scale,
        np.float32,
        [1e-45, 3e38],
        [(np.nan, "nan"), (np.inf, "inf"), (0.0, "0.0"), (-0.0, "-0.0"), (-1.5, "-1.5")],
    ),
    (finite.check_float64, np.float64, [-0.0, 1e308], [(np.nan, "nan"), (-np.inf, "-inf")]),
]


@pytest.mark.parametrize(("check", "dtype", "good", "bad"), CASES, ids=[case[0].__name__ for case in CASES])
def test_the_first_number_that_is_not_finite_is_named(
    check: Callable[[npt.NDArray[Any]], None], dtype: Any, good: list[Any], bad: list[tuple[Any, str]]
) -> None:
    array = np.ones((1500, 1000), dtype)  # more than one slice
    array[0, : len(good)] = good
    check(array)
    check(array[:0])
    for value, name in bad:
        for row, column in ((0, 0), (700, 3), (1499, 999)):
            broken = array.copy()
            broken[row, column] = value
            broken[-1, -1] = value
            with pytest.raises(NonFiniteError) as caught:
                check(broken)
            assert (caught.value.row, caught.value.column) == (row, column)
            assert caught.value.found.startswith(name)
            assert caught.value.in_scale == (check in (finite.check_e8m0, finite.check_f32_scale))
            assert f"[{row}, {column}] is {name}" in str(caught.value)
