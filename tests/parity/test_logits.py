"""Figures of logits against the plain formulas in float64, whatever pieces the vocabulary comes in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.model.references import named, streamed
from v4quant.errors import CheckFailedError
from v4quant.model.head import Head
from v4quant.model.reordered import Reordered
from v4quant.parity.logits import NO_TARGET, Collapsed, LogitFigures, Tally, compare_logits, logit_pieces, next_tokens

FLASH = named("tiny-flash")
WIDTHS = [1, 7, 10**6]
every_width = pytest.mark.parametrize("width", WIDTHS)


def pieces_of(runs: Sequence[torch.Tensor], width: int) -> Iterator[list[torch.Tensor]]:
    for first in range(0, runs[0].shape[1], width):
        yield [run[:, first : first + width] for run in runs]


def compared(
    found: torch.Tensor, expected: torch.Tensor, width: int = 7, targets: torch.Tensor | None = None
) -> LogitFigures:
    targets = torch.full((len(found),), NO_TARGET) if targets is None else targets
    return compare_logits(pieces_of([found, expected], width), [(0, 1)], targets)[0]


def random_logits(seed: int, tokens: int = 9, vocabulary: int = 100, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Direct:
    """KL(p || q) of every token by the definition, float64 [T], and how far a sum of float32 exponentials may be off.

    Terms p_v (a_v - b_v) and both log Z are computed from exponentials that are off by a few 2^-24 of themselves.
    """

    kl: torch.Tensor
    bound: torch.Tensor

    @classmethod
    def of(cls, p_logits: torch.Tensor, q_logits: torch.Tensor) -> "Direct":
        log_p, log_q = p_logits.double().log_softmax(1), q_logits.double().log_softmax(1)
        p = log_p.exp()
        far = (p * (p_logits.double() - q_logits.double()).abs()).sum(1)
        return cls((p * (log_p - log_q)).sum(1), 2**-20 * (1 + far))


def best_five(logits: torch.Tensor) -> list[list[int]]:
    """The best tokens by sorting all: larger first, of equal ones the smaller id."""
    return [sorted(range(len(row)), key=lambda token: (-row[token], token))[:5] for row in logits.tolist()]


def assert_figures(figures: LogitFigures, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Require what the definitions give."""
    forward, reverse = Direct.of(expected, found), Direct.of(found, expected)
    assert bool(((torch.tensor(figures.kl_by_token, dtype=torch.float64) - forward.kl).abs() <= forward.bound).all())
    for spread, direct in ((figures.kl, forward), (figures.kl_reverse, reverse)):
        ordered, slack = sorted(direct.kl.tolist()), float(direct.bound.max())
        assert spread.mean == pytest.approx(sum(ordered) / len(ordered), abs=slack)
        assert spread.median == pytest.approx(ordered[(len(ordered) - 1) // 2], abs=slack)
        assert spread.max == pytest.approx(ordered[-1], abs=slack)
        place = 0.99 * (len(ordered) - 1)
        below, above = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
        assert spread.p99 == pytest.approx(below + (place - int(place)) * (above - below), abs=slack)
    tokens = list(zip(best_five(found), best_five(expected), strict=True))
    assert figures.tokens == len(tokens)
    assert figures.top1 == pytest.approx(sum(one[0] == other[0] for one, other in tokens) / len(tokens))
    shares = [len(set(one) & set(other)) / len(other) for one, other in tokens]
    assert figures.top5_overlap == pytest.approx(sum(shares) / len(shares))
    bits = zip(found.view(torch.int32), expected.view(torch.int32), strict=True)
    assert figures.bit_equal == pytest.approx(sum(torch.equal(one, other) for one, other in bits) / len(tokens))


@every_width
@pytest.mark.parametrize("apart", [1e-4, 0.1, 5.0])
def test_against_the_definition(apart: float, width: int) -> None:
    expected = random_logits(0)
    found = expected + apart * random_logits(1, scale=1.0)
    found[3] = expected[3]
    assert_figures(compared(found, expected, width), found, expected)


@every_width
@pytest.mark.parametrize("scale", [1e-30, 1e3, 1e30])
def test_huge_and_small_logits(scale: float, width: int) -> None:
    expected, found = random_logits(2, scale=scale), random_logits(3, scale=scale)
    assert_figures(compared(found, expected, width), found, expected)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 5),
    vocabulary=st.integers(1, 40),
    width=st.integers(1, 41),
    steps=st.integers(1, 60),
)
def test_against_the_definition_with_many_ties(seed: int, tokens: int, vocabulary: int, width: int, steps: int) -> None:
    """Logits on a coarse grid, so that many are equal, and vocabularies of fewer than five tokens."""
    random = torch.Generator().manual_seed(seed)
    found, expected = (torch.randint(steps, (tokens, vocabulary), generator=random) / 8 for _ in range(2))
    assert_figures(compared(found, expected, width), found, expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), width=st.integers(1, 130), scale=st.sampled_from([1e-20, 1.0, 100.0, 1e20]))
@example(seed=0, width=1, scale=1.0)
def test_equal_logits_are_exactly_so(seed: int, width: int, scale: float) -> None:
    """Another tensor with the same numbers, as well as the same tensor."""
    logits = random_logits(seed, tokens=3, vocabulary=129, scale=scale)
    for other in (logits, logits.clone()):
        figures = compared(logits, other, width)
        for spread in (figures.kl, figures.kl_reverse):
            assert (spread.mean, spread.median, spread.p99, spread.max) == (0.0, 0.0, 0.0, 0.0)
        assert (figures.bit_equal, figures.top1, figures.top5_overlap) == (1.0, 1.0, 1.0)
        assert figures.kl_by_token == [0.0] * 3


@every_width
@pytest.mark.parametrize("first", [True, False])
def test_pieces_that_are_shared_and_pieces_that_are_not(first: bool, width: int) -> None:
    """Runs that share one half of the vocabulary as one tensor, the larger logits, before or behind the other half."""
    expected = random_logits(4, vocabulary=40)
    found = expected.clone()
    shared = slice(0, 20) if first else slice(20, 40)
    own = slice(20, 40) if first else slice(0, 20)
    expected[:, shared] += 4
    found[:, shared] += 4
    found[:, own] += random_logits(16, vocabulary=20)

    def pieces() -> Iterator[list[torch.Tensor]]:
        same = [[piece[0], piece[0]] for piece in pieces_of([expected[:, shared]], width)]
        other = list(pieces_of([found[:, own], expected[:, own]], width))
        yield from [*same, *other] if first else [*other, *same]

    figures = compare_logits(pieces(), [(0, 1)], torch.full((9,), NO_TARGET))[0]
    assert_figures(figures, found, expected)


def test_a_divergence_is_never_negative() -> None:
    """Logits one number of float32 apart, where what is computed is rounding alone."""
    expected = random_logits(17, tokens=500)
    found = torch.nextafter(expected, torch.tensor(torch.inf))
    figures = compared(found, expected)
    assert 0 <= min(figures.kl_by_token) < max(figures.kl_by_token) < 2**-20
    assert figures.kl_by_token.count(0.0) > 50, "and some of it came out below zero"


@pytest.mark.parametrize("width", [1, 3, 8, 10**6])
def test_of_equal_logits_the_smaller_token_is_better(width: int) -> None:
    """Whatever the pieces are: a hundred equal logits, and five of them near the end of a long row."""
    tied = torch.zeros(3, 10_000 if width > 100 else 100)
    tied[1, 90:96] = 1.0
    tied[2, 70] = 2.0
    tally = Tally(torch.full((3,), NO_TARGET))
    for piece in pieces_of([tied], width):
        tally.add(piece[0])
    assert tally.best.tolist() == [[0, 1, 2, 3, 4], [90, 91, 92, 93, 94], [70, 0, 1, 2, 3]]


@every_width
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers(number: float, width: int) -> None:
    """An infinite divergence; of a reference, a reason to compare nothing."""
    expected = random_logits(15)
    found = expected.clone()
    found[2, 50] = number
    figures = compared(found, expected, width)
    assert figures.kl.mean == figures.kl_reverse.mean == figures.kl.max == torch.inf
    assert figures.kl_by_token == [torch.inf if token == 2 else 0.0 for token in range(9)]
    with pytest.raises(CheckFailedError, match="the reference's logits of 1 of 9 tokens are NaN or infinite"):
        compared(expected, found, width)


def test_one_bit_is_seen() -> None:
    """The sign of a zero changes no figure but this one."""
    expected = random_logits(5)
    expected[2, 50] = 0.0
    found = expected.clone()
    found[2, 50] = -0.0
    figures = compared(found, expected)
    assert figures.bit_equal == pytest.approx(8 / 9)
    assert figures.kl.max <= 2**-20


def test_the_larger_kl_is_told_apart_from_the_reverse() -> None:
    """Two tokens, by hand: KL(p || q) of p = (1/2, 1/2) and q = (3/4, 1/4)."""
    expected, found = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    figures = compared(found, expected)
    assert figures.kl.mean == pytest.approx(0.5 * torch.tensor(4 / 3).log().item(), abs=2**-20)
    assert figures.kl_reverse.mean == pytest.approx(0.75 * 0.4054651 - 0.25 * 0.6931472, abs=2**-20)


@every_width
def test_perplexity(width: int) -> None:
    found, expected = random_logits(6), random_logits(7)
    targets = torch.randint(100, (9,), generator=torch.Generator().manual_seed(8))
    targets[[0, 8]] = torch.tensor([0, 99])  # the ends of the vocabulary
    targets[4] = NO_TARGET
    figures = compared(found, expected, width, targets)
    known = targets != NO_TARGET
    for value, logits in ((figures.perplexity_found, found), (figures.perplexity_expected, expected)):
        loss = torch.nn.functional.cross_entropy(logits[known].double(), targets[known])
        assert value == pytest.approx(float(loss.exp()), rel=1e-6)


def test_labels_that_are_shifted_are_seen() -> None:
    """Logits that know the next token: perplexity 1 with the tokens that follow, huge with the tokens themselves."""
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    targets = next_tokens([ids])
    logits = torch.zeros(8, 10)
    logits[torch.arange(7), ids[1:]] = 50.0
    assert compared(logits, logits, targets=targets).perplexity_found == pytest.approx(1.0)
    shifted = compared(logits, logits, targets=torch.cat([ids[:7], torch.tensor([NO_TARGET])]))
    assert shifted.perplexity_found is not None
    assert shifted.perplexity_found > 1e6


def test_the_tokens_that_follow_stay_within_their_prompt() -> None:
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 10])]
    assert next_tokens(prompts).tolist() == [6, 7, NO_TARGET, NO_TARGET, 10, NO_TARGET]


def test_no_token_follows() -> None:
    figures = compared(random_logits(9, tokens=1), random_logits(10, tokens=1))
    assert figures.perplexity_expected is None
    assert figures.perplexity_found is None


def test_several_pairs_of_one_pass() -> None:
    runs = [random_logits(seed) for seed in (11, 12, 13)]
    pairs = [(2, 0), (0, 2), (1, 1)]
    many = compare_logits(pieces_of(runs, 7), pairs, torch.full((9,), NO_TARGET))
    for figures, (found, expected) in zip(many, pairs, strict=True):
        assert figures == compared(runs[found], runs[expected])


def test_pieces_are_the_logits_of_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two checkpoints, and of the MTP block's head, in pieces that do not divide the vocabulary."""
    monkeypatch.setattr("v4quant.model.head._PIECE_ROWS", 200)
    random = torch.Generator().manual_seed(14)
    streams = [torch.randn(4, 4, 256, generator=random).to(torch.bfloat16) for _ in range(2)]
    with torch.inference_mode(), streamed(FLASH.folder) as model, streamed(named("tiny-base").folder) as other:
        heads = [model.head(), other.head(), model.head(0)]
        runs = [Collapsed.of(head, own, model.ops) for head in heads for own in streams]
        pieces = list(logit_pieces(runs))
        assert [piece[0].shape[1] for piece in pieces] == [200, 200, 112]
        for place, found in enumerate(zip(*pieces, strict=True)):
            assert torch.equal(torch.cat(found, 1), heads[place // 2].logits(streams[place % 2]))


def test_runs_that_bring_the_same_numbers_share_their_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkpoints with one vocabulary matrix: one product for both, and none shared where sums are reordered."""
    products: list[torch.Tensor] = []
    product = Head.product

    def seen(head: Head, x: torch.Tensor, *args: Any) -> torch.Tensor:
        products.append(x)
        return product(head, x, *args)

    monkeypatch.setattr(Head, "product", seen)
    with torch.inference_mode(), streamed(FLASH.folder) as model, streamed(FLASH.folder) as twin:
        streams = model.embed(FLASH.ids[:3])
        head, reordered = model.head(), Reordered(model.config)
        x = head.collapse(streams, model.ops)
        runs = [
            Collapsed(head, x, model.ops),
            Collapsed(head, x.clone(), twin.ops),
            Collapsed(twin.head(), x, model.ops),
            Collapsed(head, x, reordered),
            Collapsed(head, x + 1, model.ops),
        ]
        (made,) = list(logit_pieces(runs))
        assert made[0] is made[1] is made[2]
        assert len(products) == 3
        assert torch.equal(made[3], head.product(x, next(iter(head.pieces())), reordered))
        assert torch.equal(made[4], head.product(x + 1, next(iter(head.pieces())), model.ops))


def test_another_vocabulary_matrix_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal in the first piece, another number in the second."""
    monkeypatch.setattr("v4quant.model.head._PIECE_ROWS", 300)
    with torch.inference_mode(), streamed(FLASH.folder) as model, streamed(FLASH.folder) as other:
        head, changed = model.head(), other.head()
        pieces = [piece.clone() for piece in changed.pieces()]
        pieces[1][7, 3] += 1
        monkeypatch.setattr(changed, "pieces", lambda: pieces)
        x = head.collapse(model.embed(FLASH.ids[:3]), model.ops)
        first, second = logit_pieces([Collapsed(head, x, model.ops), Collapsed(changed, x, model.ops)])
        assert first[0] is first[1]
        assert not torch.equal(second[0], second[1])
        assert torch.equal(second[0][:, :7], second[1][:, :7])
