"""route and route_by_hash, the torch references: against float64, ties, extremes, the bias, and the refusals."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from v4quant.kernels.route import route, route_by_hash


def random_logits(tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(experts)
    return torch.randn(tokens, experts, generator=random) * 6, torch.randn(experts, generator=random)


def float64_scores(logits: torch.Tensor) -> npt.NDArray[np.float64]:
    scores: npt.NDArray[np.float64] = np.sqrt(np.logaddexp(0, logits.double().numpy()))
    return scores


@pytest.mark.parametrize(("experts", "k"), [(256, 6), (384, 6), (7, 7), (1, 1)])
def test_agrees_with_float64(experts: int, k: int) -> None:
    logits, bias = random_logits(50, experts)
    found, weights = route(logits, bias, k, 2.5)
    scores = float64_scores(logits)
    expected = np.argsort(-(scores + bias.double().numpy()), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.numpy(), expected)
    picked = np.take_along_axis(scores, expected, 1)
    np.testing.assert_allclose(weights.numpy(), picked / picked.sum(1, keepdims=True) * 2.5, rtol=2e-6)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    found, weights = route(logits, torch.tensor([0.0, 0.0, 0.0, 100.0]), 2, 1.5)
    assert found.tolist() == [[3, 0]]
    scores = float64_scores(logits)[0]
    np.testing.assert_allclose(weights[0].numpy(), scores[[3, 0]] / scores[[3, 0]].sum() * 1.5, rtol=1e-6)


def test_equal_scores_go_to_the_lowest_experts() -> None:
    found, weights = route(torch.zeros(2, 256), torch.zeros(256), 6, 1.5)
    assert found.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    np.testing.assert_allclose(weights.numpy(), 0.25, rtol=1e-6)


@pytest.mark.parametrize("x", [-170.0, -104.0, -88.0, -20.0, -16.7, 0.0, 20.0, 89.0, 1e6])
def test_extreme_logits(x: float) -> None:
    """log(1 + exp(x)) as written gives 0 below -16.7 and infinity above 88.7."""
    logits = torch.tensor([[x, x - 1, -300.0]])
    _, weights = route(logits, torch.zeros(3), 2, 1.0)
    scores = float64_scores(logits)[0, :2]
    np.testing.assert_allclose(weights[0].numpy(), scores / scores.sum(), rtol=2e-5)


def test_hash_layers_take_the_tables_row() -> None:
    logits, _ = random_logits(4, 16)
    table = torch.arange(40).reshape(10, 4) % 16
    found, weights = route_by_hash(logits, torch.tensor([9, 0, 9, 3]), table, 1.5)
    assert found.tolist() == [[4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7], [12, 13, 14, 15]]
    picked = np.take_along_axis(float64_scores(logits), found.numpy(), 1)
    np.testing.assert_allclose(weights.numpy(), picked / picked.sum(1, keepdims=True) * 1.5, rtol=2e-6)


def test_hash_layers_with_small_scores_have_weights() -> None:
    _, weights = route_by_hash(torch.full((1, 8), -110.0), torch.tensor([0]), torch.arange(4)[None], 1.0)
    np.testing.assert_allclose(weights.numpy(), 0.25, rtol=1e-6)


def test_no_tokens() -> None:
    assert route(torch.zeros(0, 8), torch.zeros(8), 2, 1.0)[0].shape == (0, 2)
    assert route_by_hash(torch.zeros(0, 8), torch.zeros(0).long(), torch.zeros(3, 2).long(), 1.0)[1].shape == (0, 2)


@pytest.mark.parametrize(
    ("logits", "bias", "k", "error", "message"),
    [
        (torch.zeros(2, 8).bfloat16(), torch.zeros(8), 2, TypeError, "logits is torch.bfloat16"),
        (torch.zeros(2, 8), torch.zeros(9), 2, ValueError, r"bias has shape \[9\], expected \[8\]"),
        (torch.zeros(2, 8), torch.zeros(8), 9, ValueError, "k is 9 of 8 experts"),
        (torch.zeros(2, 8), torch.zeros(8), 0, ValueError, "k is 0"),
    ],
)
def test_route_refuses(logits: torch.Tensor, bias: torch.Tensor, k: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        route(logits, bias, k, 1.0)


@pytest.mark.parametrize(
    ("ids", "table", "error", "message"),
    [
        (torch.zeros(2).int(), torch.zeros(3, 2).long(), TypeError, "token_ids is torch.int32"),
        (torch.zeros(3).long(), torch.zeros(3, 2).long(), ValueError, r"token_ids has shape \[3\], expected \[2\]"),
        (torch.zeros(2).long(), torch.zeros(3, 2).int(), TypeError, "table is torch.int32"),
        (torch.zeros(2).long(), torch.zeros(3, 0).long(), ValueError, "table has 0 columns"),
    ],
)
def test_route_by_hash_refuses(ids: torch.Tensor, table: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        route_by_hash(torch.zeros(2, 8), ids, table, 1.0)
