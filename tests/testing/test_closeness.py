"""bf16_steps counts BF16 numbers; assert_bf16_close refuses what is far, not finite, or different too often."""

import pytest
import torch

from v4quant.testing.closeness import assert_bf16_close, bf16_steps


def bf16(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


def test_steps() -> None:
    smallest = 2.0**-133
    found = bf16_steps(bf16(1, 0.0, smallest, 1), bf16(1.0078125, -0.0, -smallest, 0.99609375))
    assert found.tolist() == [1, 0, 2, 1]


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (bf16(1, 2), bf16(1, 2.03125), r"1 too far, first at \[1\]: 2.0, expected 2.03125"),
        (bf16(1, 2), bf16(1, float("nan")), "not finite"),
        (bf16(1), bf16(1, 2), "shape"),
        (torch.ones(1), bf16(1), "torch.float32 against"),
        (bf16(1).repeat(2000), bf16(1.0078125).repeat(2000), "2000 of 2000 differ"),
    ],
)
def test_refuses(actual: torch.Tensor, expected: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_bf16_close(actual, expected)


def test_accepts_one_neighbour() -> None:
    assert_bf16_close(bf16(1, 2, 3), bf16(1, 2, 3.015625))
