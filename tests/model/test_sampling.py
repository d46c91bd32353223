"""The next token: the best one, and draws that follow the distribution which numpy says they have."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from v4quant.errors import CheckFailedError, UsageError
from v4quant.model.sampling import Sampler, Sampling

Array = npt.NDArray[np.float64]
DRAWS = 6_000


def reference(logits: Array, temperature: float, top_p: float) -> Array:
    """Nucleus sampling as its paper has it, token by token: the smallest set whose probability reaches top_p."""
    weights = np.exp((logits - logits.max()) / temperature)
    probabilities = weights / weights.sum()
    kept, mass = np.zeros_like(probabilities), 0.0
    for token in sorted(range(len(logits)), key=lambda token: (-logits[token], token)):
        kept[token] = probabilities[token]
        mass += probabilities[token]
        if mass >= top_p:
            break
    result: Array = kept / kept.sum()
    return result


def drawn(logits: Array, sampling: Sampling) -> npt.NDArray[np.int64]:
    """How often each token comes."""
    sampler, given = Sampler(sampling), torch.tensor(logits, dtype=torch.float32)
    return np.bincount([sampler.choose(given) for _ in range(DRAWS)], minlength=len(logits))


LOGITS = np.random.default_rng(5).normal(0, 2, 40).astype(np.float32).astype(np.float64)
LOGITS[[3, 17]] = LOGITS[9] = LOGITS.max()  # the best three alike


def surprise(counts: npt.NDArray[np.int64], expected: Array) -> float:
    """Chi-square of counts, less its mean, in deviations: about -1 to 3 for draws from this distribution."""
    inside = DRAWS * expected >= 5
    freedoms = int(inside.sum()) - 1
    chi = float((np.square(counts - DRAWS * expected)[inside] / (DRAWS * expected)[inside]).sum())
    return (chi - freedoms) / math.sqrt(2 * freedoms)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.9), (0.7, 0.95), (2.5, 0.6), (1e-3, 1.0), (1e-310, 0.5)]
)
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    with np.errstate(over="ignore"):
        expected = reference(LOGITS, temperature, top_p)
    counts = drawn(LOGITS, Sampling(temperature, top_p, seed=11))
    assert not counts[expected == 0].any(), "a token outside of the nucleus"
    assert surprise(counts, expected) < 4


def test_another_distribution_is_told_apart() -> None:
    """Negative control: the same test fails for a temperature that is 20 % off."""
    assert surprise(drawn(LOGITS, Sampling(1.0, 1.0, seed=11)), reference(LOGITS, 1.2, 1.0)) > 8


def test_the_smallest_nucleus_is_one_token() -> None:
    assert {Sampler(Sampling(2.0, 1e-9, seed)).choose(torch.tensor(LOGITS)) for seed in range(20)} == {3}


def test_the_cut_takes_equal_logits_in_the_order_of_ids() -> None:
    counts = drawn(np.zeros(8), Sampling(1.0, 0.5))
    assert counts[:4].min() > 0.2 * DRAWS and not counts[4:].any()


def test_the_best_token_is_the_first_of_equal_ones() -> None:
    logits = torch.full((129_280,), -3.0)
    logits[[700, 90_000, 129_279]] = 4.0
    assert Sampler(Sampling()).choose(logits) == 700
    assert Sampler(Sampling(top_p=0.1, seed=3)).choose(logits) == 700, "greedy whatever the rest says"


def test_a_seed_decides() -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))

    def text(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1.0, 0.9, seed))
        return [sampler.choose(logits) for _ in range(20)]

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_numbers_no_token(wrong: float, temperature: float) -> None:
    logits = torch.zeros(10)
    logits[[2, 5]] = wrong
    with pytest.raises(CheckFailedError, match="2 of 10 logits are NaN or infinite"):
        Sampler(Sampling(temperature)).choose(logits)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected 0 or a positive number"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": 0.0}, "top-p is 0.0, expected more than 0, at most 1"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"top_p": math.nan}, "top-p is nan"),
        ({"seed": -1}, "seed is -1, expected 0 to"),
        ({"seed": 2**63}, "seed is"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Sampling(**arguments)  # type: ignore[arg-type]
