"""Every figure of a block against a plain formula, with zeros, single tokens, rare experts and picks of none."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from v4quant.model.streaming import BlockResult
from v4quant.parity import figures
from v4quant.parity.figures import (
    RoutingFigures,
    StreamFigures,
    compare_block,
    compare_routing,
    compare_streams,
    indexer_overlap,
    token_errors,
)

TOKENS, STREAMS, DIMS = 11, 4, 32


def streams(seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, STREAMS, DIMS, generator=random).to(torch.bfloat16)


def figures_of(found: torch.Tensor, expected: torch.Tensor) -> StreamFigures:
    return compare_streams(found, expected, token_errors(found, expected))


def norm(numbers: list[float]) -> float:
    return math.sqrt(math.fsum(number * number for number in numbers))


def plain_figures(found: torch.Tensor, expected: torch.Tensor) -> StreamFigures:
    """The definitions in plain Python numbers, sums exact."""
    ours, theirs = found.flatten(1).double().tolist(), expected.flatten(1).double().tolist()
    apart = [[a - b for a, b in zip(one, other, strict=True)] for one, other in zip(ours, theirs, strict=True)]
    errors = [norm(far) / norm(wanted) if any(far) else 0.0 for far, wanted in zip(apart, theirs, strict=True)]
    every = [[number for row in rows for number in row] for rows in (ours, theirs, apart)]
    product = math.fsum(a * b for a, b in zip(every[0], every[1], strict=True))
    worst = max(range(len(errors)), key=lambda token: errors[token])
    return StreamFigures(
        rel_err=norm(every[2]) / norm(every[1]),
        median_rel_err=sorted(errors)[(len(errors) - 1) // 2],
        max_abs=max(abs(far) for far in every[2]),
        cosine=product / (norm(every[0]) * norm(every[1])),
        bit_equal=sum(not any(far) for far in apart) / len(apart),
        worst_token=worst,
        worst_token_rel_err=errors[worst],
    )


def assert_close(found: StreamFigures, expected: StreamFigures) -> None:
    """Equal up to float64 sums."""
    for name in StreamFigures.__dataclass_fields__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12), name


@pytest.mark.parametrize("apart", [1e-2, 1.0, 1e4])
def test_streams_against_the_definition(apart: float) -> None:
    expected = streams(0)
    found = (expected + apart * streams(1)).to(torch.bfloat16)
    found[4] = expected[4]
    assert_close(figures_of(found, expected), plain_figures(found, expected))


@pytest.mark.parametrize("token", [0, 5, TOKENS - 1])
def test_one_token_off_by_one_bit(token: int) -> None:
    expected = streams(2)
    found = expected.clone()
    found.view(torch.int16)[token, 1, 7] ^= 1
    figures = figures_of(found, expected)
    assert_close(figures, plain_figures(found, expected))
    assert (figures.worst_token, figures.median_rel_err) == (token, 0.0)
    assert figures.bit_equal == pytest.approx((TOKENS - 1) / TOKENS)
    assert figures.rel_err > 0


def test_many_tokens() -> None:
    """Sums of millions, where those of float32 would be off by 0.04 percent and a cosine be larger than 1."""
    expected = torch.randn(20_000, 4, 125, generator=torch.Generator().manual_seed(11)).to(torch.bfloat16)
    found = expected.clone()
    found[-1] = 2 * found[-1]
    found[77] = 0.0
    figures = figures_of(found, expected)
    squares = expected.flatten(1).double().square().sum(1)
    far, near = float(squares[-1] + squares[77]), float(squares.sum())
    assert figures.rel_err == pytest.approx(math.sqrt(far / near), rel=1e-9)
    own = near + 3 * float(squares[-1]) - float(squares[77])
    product = near + float(squares[-1]) - float(squares[77])
    assert figures.cosine == pytest.approx(product / math.sqrt(near * own), rel=1e-9)
    assert figures.max_abs == float(torch.maximum(expected[-1].abs(), expected[77].abs()).max())


def test_huge_streams() -> None:
    """Squares beyond float32."""
    found, expected = 1.5 * (1e25 * streams(12)), 1e25 * streams(12)
    figures = figures_of(found, expected)
    assert_close(figures, plain_figures(found, expected))
    assert figures.rel_err == pytest.approx(0.5, rel=1e-2)


def test_equal_streams() -> None:
    equal = StreamFigures(0.0, 0.0, 0.0, 1.0, 1.0, 0, 0.0)
    assert figures_of(streams(3), streams(3)) == equal
    assert figures_of(torch.zeros_like(streams(3)), torch.zeros_like(streams(3))) == equal


def test_a_zero_of_the_other_sign_is_another_bit_and_no_error() -> None:
    expected = streams(4)
    expected[2, 0, 0] = 0.0
    found = expected.clone()
    found[2, 0, 0] = -0.0
    figures = figures_of(found, expected)
    assert figures.bit_equal == pytest.approx((TOKENS - 1) / TOKENS)
    assert (figures.rel_err, figures.max_abs, figures.worst_token_rel_err) == (0.0, 0.0, 0.0)
    assert figures.cosine == pytest.approx(1.0)


def test_a_token_that_should_be_zero() -> None:
    expected, found = streams(5), streams(5)
    expected[3], expected[6], found[6] = 0.0, 0.0, 0.0
    errors = token_errors(found, expected)
    assert errors[3] == math.inf
    assert errors[6] == 0.0
    figures = figures_of(found, expected)
    assert (figures.worst_token, figures.worst_token_rel_err) == (3, math.inf)
    assert figures.rel_err == pytest.approx(norm(found[3].flatten().tolist()) / norm(expected.flatten().tolist()))


def test_everything_should_be_zero() -> None:
    figures = figures_of(streams(6), torch.zeros_like(streams(6)))
    assert (figures.rel_err, figures.cosine) == (math.inf, 0.0)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none(number: float) -> None:
    """An infinite error of their token, and of all; the median is of the others."""
    found = streams(13)
    found[4, 2, 1] = number
    figures = figures_of(found, streams(13))
    assert (figures.rel_err, figures.max_abs, figures.cosine) == (math.inf, math.inf, 0.0)
    assert (figures.worst_token, figures.worst_token_rel_err, figures.median_rel_err) == (4, math.inf, 0.0)


def test_streams_turned_round() -> None:
    assert figures_of(-streams(7), streams(7)).cosine == pytest.approx(-1.0)
    assert figures_of(-streams(7), streams(7)).rel_err == pytest.approx(2.0)


def result(indices: torch.Tensor, weights: torch.Tensor | None = None, own: torch.Tensor | None = None) -> BlockResult:
    weights = torch.ones(indices.shape) if weights is None else weights
    return BlockResult(torch.zeros(len(indices), 1, 1) if own is None else own, indices, weights, None)


def routing(
    found: torch.Tensor, expected: torch.Tensor, weights: torch.Tensor | None = None, errors: torch.Tensor | None = None
) -> RoutingFigures:
    errors = torch.zeros(len(expected), dtype=torch.float64) if errors is None else errors
    return compare_routing(result(found), result(expected, weights), errors)


def test_routing_by_hand() -> None:
    """Order does not matter; of two tokens one pick of weight 3 of 10 is another."""
    expected, found = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [3, 7]])
    figures = routing(found, expected, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert figures.agreement == 0.75
    assert figures.swapped_mass == pytest.approx(0.3)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 40), picks=st.integers(1, 6), experts=st.integers(6, 12))
def test_routing_against_the_definition(seed: int, tokens: int, picks: int, experts: int) -> None:
    random = torch.Generator().manual_seed(seed)
    found, expected = (torch.rand(tokens, experts, generator=random).argsort(1)[:, :picks] for _ in range(2))
    weights = torch.rand(tokens, picks, generator=random) + 0.1
    errors = torch.rand(tokens, generator=random, dtype=torch.float64)
    figures = routing(found, expected, weights, errors)
    pairs = list(zip(found.tolist(), expected.tolist(), weights.double().tolist(), strict=True))
    kept = sum(len(set(one) & set(other)) for one, other, _ in pairs)
    assert figures.agreement == pytest.approx(kept / (tokens * picks))
    lost = sum(w for one, other, own in pairs for expert, w in zip(other, own, strict=True) if expert not in one)
    assert figures.swapped_mass == pytest.approx(lost / sum(sum(own) for *_, own in pairs))
    medians = {}
    for expert in range(experts):
        own = sorted(float(errors[token]) for token in range(tokens) if expert in expected[token].tolist())
        if len(own) >= 8:
            medians[expert] = own[(len(own) - 1) // 2]
    worst = max(medians.items(), key=lambda item: item[1], default=(-1, 0.0))
    assert (figures.worst_expert, figures.worst_expert_rel_err) == worst


@pytest.mark.parametrize(("tokens", "worst"), [(7, (2, 0.5)), (8, (1, 3.0))])
def test_an_expert_speaks_for_itself_from_eight_tokens_on(tokens: int, worst: tuple[int, float]) -> None:
    """Expert 1 is far off, in so many tokens; expert 2 has 20."""
    indices = torch.tensor([[1]] * tokens + [[2]] * 20)
    errors = torch.tensor([3.0] * tokens + [0.5] * 20, dtype=torch.float64)
    figures = routing(indices, indices, errors=errors)
    assert (figures.worst_expert, figures.worst_expert_rel_err) == worst


def test_no_expert_stands_out_where_nothing_differs() -> None:
    indices = torch.zeros(20, 1, dtype=torch.int64)
    assert routing(indices, indices) == RoutingFigures(1.0, 0.0, -1, 0.0)
    few = torch.arange(7)[:, None]
    assert routing(few, few, errors=torch.ones(7, dtype=torch.float64)) == RoutingFigures(1.0, 0.0, -1, 0.0)


def test_experts_are_those_that_were_expected() -> None:
    """Tokens count for the expert that the reference sent them to."""
    expected, found = torch.full((9, 1), 4), torch.full((9, 1), 5)
    figures = routing(found, expected, errors=torch.full((9,), 0.25, dtype=torch.float64))
    assert figures == RoutingFigures(0.0, 1.0, 4, 0.25)


def test_overlap_by_hand() -> None:
    """Order does not matter, -1 is none on either side, and lists may have other widths."""
    expected = torch.tensor([[0, 1, -1], [5, 6, 7], [-1, -1, -1]], dtype=torch.int32)
    found = torch.tensor([[1, 0, -1, -1], [7, 9, -1, 3], [-1, -1, -1, -1]], dtype=torch.int32)
    assert indexer_overlap(found, expected) == pytest.approx(3 / 5)
    assert indexer_overlap(expected, found) == pytest.approx(3 / 5)
    assert indexer_overlap(torch.full_like(found, -1), expected) == 0.0
    assert indexer_overlap(found, torch.full_like(expected, -1)) == 1.0


def test_overlap_without_an_indexer() -> None:
    picks = torch.zeros(1, 1, dtype=torch.int32)
    assert indexer_overlap(None, picks) is None
    assert indexer_overlap(picks, None) is None
    assert indexer_overlap(None, None) is None


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 150), width=st.integers(1, 9))
def test_overlap_against_the_definition(seed: int, tokens: int, width: int) -> None:
    """Over more rows than are compared at a time; each row picks different entries, or none."""
    random = torch.Generator().manual_seed(seed)
    found, expected = (torch.rand(tokens, 16, generator=random).argsort(1)[:, :width].int() for _ in range(2))
    found[torch.rand(found.shape, generator=random) < 0.3] = -1
    expected[torch.rand(expected.shape, generator=random) < 0.3] = -1
    pairs = [(set(one) - {-1}, set(other) - {-1}) for one, other in zip(found.tolist(), expected.tolist(), strict=True)]
    count = sum(len(other) for _, other in pairs)
    wanted = sum(len(one & other) for one, other in pairs) / count if count else 1.0
    assert indexer_overlap(found, expected) == pytest.approx(wanted)


def test_rows_are_compared_some_at_a_time() -> None:
    """The test above crosses pieces."""
    assert figures._ROWS < 150


def test_a_block_is_all_of_them() -> None:
    random = torch.Generator().manual_seed(8)
    one, other = (
        BlockResult(
            streams(seed),
            torch.rand(TOKENS, 8, generator=random).argsort(1)[:, :3],
            torch.rand(TOKENS, 3, generator=random),
            torch.rand(TOKENS, 8, generator=random).argsort(1)[:, :3].int(),
        )
        for seed in (9, 10)
    )
    errors = token_errors(one.streams, other.streams)
    found = compare_block(one, other)
    assert found.streams == compare_streams(one.streams, other.streams, errors)
    assert found.routing == compare_routing(one, other, errors)
    assert found.indexer_overlap == indexer_overlap(one.indexer_topk, other.indexer_topk)
