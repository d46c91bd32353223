"""rope and its frequencies: against float64 and figures by hand; the inverse, the untouched dims, the refusals."""

import math

import numpy as np
import pytest
import torch

from v4quant.config import RopeScaling
from v4quant.kernels.rope import rope, rope_
from v4quant.kernels.rope_frequencies import rope_frequencies, rope_table

YARN = RopeScaling(factor=16, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1)


def heads(tokens: int, count: int, dims: int) -> torch.Tensor:
    return torch.randn(tokens, count, dims, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)


def test_plain_frequencies() -> None:
    found = rope_frequencies(64, 10000.0)
    assert found.shape == (32,) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), 10000.0 ** (-np.arange(32) / 32), rtol=1e-6)


def test_yarn_keeps_fast_frequencies_and_slows_slow_ones() -> None:
    """Within 65,536 tokens dim 15 (15.45 rounded down) turns over 32 times, dim 25 (24.7 rounded up) less than once."""
    plain, found = rope_frequencies(64, 160000.0).double(), rope_frequencies(64, 160000.0, YARN).double()
    expected = [1.0] * 16 + [1 - (i - 15) / 10 * (1 - 1 / 16) for i in range(16, 25)] + [1 / 16] * 7
    np.testing.assert_allclose((found / plain).numpy(), expected, rtol=1e-6)
    turns = 65536 * 160000.0 ** (-2 * 15.45 / 64) / (2 * math.pi)
    assert abs(turns - 32) < 0.1


def test_yarn_of_a_single_dim_width() -> None:
    """Where both bounds round to the same dim the ramp is a step, not a division by zero."""
    same = RopeScaling(factor=4, original_max_position_embeddings=16, beta_fast=1000, beta_slow=2.6)
    found = rope_frequencies(8, 10000.0, same)
    assert bool(found.isfinite().all())
    np.testing.assert_allclose((rope_frequencies(8, 10000.0) / found).numpy(), [1, 4, 4, 4], rtol=1e-6)


def test_table_is_cos_then_sin_of_float32_angles() -> None:
    frequencies = rope_frequencies(64, 160000.0, YARN)
    positions = torch.tensor([0, 1, 127, 1_048_575])
    table = rope_table(positions, frequencies)
    angles = np.outer(positions.numpy().astype(np.float32), frequencies.numpy()).astype(np.float64)
    np.testing.assert_allclose(table.numpy(), np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=1e-7)


@pytest.mark.parametrize("inverse", [False, True])
def test_agrees_with_float64(inverse: bool) -> None:
    x, table = heads(7, 3, 128), rope_table(torch.arange(7) * 37, rope_frequencies(64, 10000.0))
    found = rope(x, table, inverse)
    turn = table[:, :32].double().numpy() + 1j * table[:, 32:].double().numpy()
    pairs = x[..., 64:].double().numpy().reshape(7, 3, 32, 2)
    rotated = (pairs[..., 0] + 1j * pairs[..., 1]) * (turn.conj() if inverse else turn)[:, None]
    expected = np.stack([rotated.real, rotated.imag], -1).reshape(7, 3, 64)
    np.testing.assert_allclose(found[..., 64:].double().numpy(), expected, rtol=2.0**-8, atol=2.0**-20)
    assert torch.equal(found[..., :64], x[..., :64])


def test_a_quarter_turn_back() -> None:
    x = torch.tensor([[[9.0, 3.0, 4.0]]], dtype=torch.bfloat16)
    assert rope(x, torch.tensor([[0.0, 1.0]]), inverse=True).tolist() == [[[9.0, 4.0, -3.0]]]
    assert rope(x, torch.tensor([[0.0, 1.0]])).tolist() == [[[9.0, -4.0, 3.0]]]
    assert x.tolist() == [[[9.0, 3.0, 4.0]]]


def test_in_place_returns_its_argument() -> None:
    x, table = heads(2, 2, 64), rope_table(torch.arange(2), rope_frequencies(64, 10000.0))
    expected = rope(x, table)
    assert rope_(x, table) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("x", "cos_sin", "error", "message"),
    [
        (torch.zeros(2, 1, 64), torch.zeros(2, 64), TypeError, "x is torch.float32"),
        (heads(2, 1, 64), torch.zeros(2, 64).double(), TypeError, "cos_sin is torch.float64"),
        (heads(2, 1, 64), torch.zeros(3, 64), ValueError, r"cos_sin has shape \[3, 64\]"),
        (heads(2, 1, 64), torch.zeros(2, 128), ValueError, "cos_sin has 128 columns"),
        (heads(2, 1, 64), torch.zeros(2, 48), ValueError, "cos_sin has 48 columns"),
        (heads(2, 4, 64).transpose(0, 1), torch.zeros(4, 64), ValueError, "x is not contiguous"),
    ],
)
def test_refusals(x: torch.Tensor, cos_sin: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rope_(x, cos_sin)


@pytest.mark.parametrize(("dims", "theta"), [(63, 10000.0), (0, 10000.0), (64, 1.0)])
def test_frequencies_refuse(dims: int, theta: float) -> None:
    with pytest.raises(ValueError, match=f"rope_dims is {dims} and theta {theta}"):
        rope_frequencies(dims, theta)
