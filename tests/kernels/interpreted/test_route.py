"""route and route_by_hash: the references' experts exactly, their weights within a few FP32 ulps."""

import pytest
import torch

from v4quant.kernels._route_triton import tokens_per_program
from v4quant.kernels.route import route, route_by_hash, route_by_hash_torch, route_torch

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def random_logits(tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(experts)
    # NaN behind: reading beyond the last token or expert fails.
    logits = torch.full((tokens + 1, experts), torch.nan)
    logits[:tokens] = torch.randn(tokens, experts, generator=random) * 6
    bias = torch.full((experts + 9,), torch.nan)
    bias[:experts] = torch.randn(experts, generator=random)
    return logits[:tokens], bias[:experts]


@pytest.mark.parametrize(("tokens", "experts", "k"), [(19, 256, 6), (7, 384, 6), (1, 100, 8), (5, 7, 7), (0, 256, 6)])
def test_equals_the_reference(tokens: int, experts: int, k: int) -> None:
    logits, bias = random_logits(tokens, experts)
    found, weights = route(logits, bias, k, 1.5)
    expected, expected_weights = route_torch(logits, bias, k, 1.5)
    assert torch.equal(found, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=0)


def test_ties_go_to_the_lowest_experts() -> None:
    """Six different values, so that nearly every choice is among equals; the bias is negative for half of them."""
    random = torch.Generator().manual_seed(3)
    logits = torch.randint(-1, 2, (40, 100), generator=random).float()
    bias = torch.tensor([0.0, -8.0]).repeat(50)
    found, weights = route(logits, bias, 60, 2.5)  # 50 without the bias, 10 with it
    expected, expected_weights = route_torch(logits, bias, 60, 2.5)
    assert torch.equal(found, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=5e-6, atol=0)


def test_extreme_logits() -> None:
    logits = torch.tensor(
        [[x, x - 1, x - 2, -1e30] for x in (-170.0, -104.0, -88.0, -20.0, -16.7, 0.0, 20.0, 89.0, 1e6)]
    )
    found, weights = route(logits, torch.zeros(4), 3, 1.0)
    assert found.tolist() == [[0, 1, 2]] * 9
    expected = torch.logaddexp(logits.double(), torch.zeros(1).double()).sqrt()[:, :3]
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_gives_experts_in_range_and_weights_that_show_it() -> None:
    logits, bias = random_logits(2, 20)
    logits[1, 3:] = torch.nan
    found, weights = route(logits, bias, 6, 1.0)
    assert torch.equal(found, route_torch(logits, bias, 6, 1.0)[0])
    assert bool(weights[0].isfinite().all()) and bool(weights[1].isnan().all())


@pytest.mark.parametrize("k", [1, 6, 8])
def test_hash_equals_the_reference(k: int) -> None:
    random = torch.Generator().manual_seed(k)
    logits, _ = random_logits(37, 256)
    table = torch.randint(0, 256, (100, k), generator=random)
    ids = torch.randint(0, 100, (37,), generator=random)
    ids[:2] = torch.tensor([0, 99])
    found, weights = route_by_hash(logits, ids, table, 2.5)
    expected, expected_weights = route_by_hash_torch(logits, ids, table, 2.5)
    assert torch.equal(found, expected)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_hash_out_of_range_reads_nothing_and_shows() -> None:
    table = torch.tensor([[0, 1], [2, 99]])
    found, weights = route_by_hash(torch.ones(4, 8), torch.tensor([0, 1, 2, -1]), table, 1.0)
    assert found.tolist() == [[0, 1], [2, 99], [-1, -1], [-1, -1]]
    assert weights[0].tolist() == [0.5, 0.5] and bool(weights[1:].isnan().all())


def test_hash_of_no_tokens() -> None:
    assert route_by_hash(torch.zeros(0, 8), torch.zeros(0).long(), torch.zeros(3, 2).long(), 1.0)[1].shape == (0, 2)


def test_tokens_per_program() -> None:
    assert [tokens_per_program(experts) for experts in (1, 256, 384, 8192)] == [2048, 8, 4, 1]
