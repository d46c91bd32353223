"""How far the outputs of a block lie apart: streams, routing, and the indexer's picks.

T tokens, S streams of d, k experts a token, K picked entries. "Expected" is the reference's, "found" the other run's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from v4quant.model.streaming import BlockResult

# An expert speaks for itself from this many tokens on: the median of fewer is one odd token's.
_MIN_EXPERT_TOKENS = 8


@dataclass(frozen=True)
class StreamFigures:
    """Residual streams against those expected.

    Attributes:
        rel_err: Frobenius norm of the difference over that of what was expected, all tokens.
        median_rel_err: median over tokens of the same, token by token.
        max_abs: largest difference of two numbers.
        cosine: between all numbers of both.
        bit_equal: share of tokens that are equal bit by bit.
        worst_token, worst_token_rel_err: the token that is farthest off.
    """

    rel_err: float
    median_rel_err: float
    max_abs: float
    cosine: float
    bit_equal: float
    worst_token: int
    worst_token_rel_err: float


@dataclass(frozen=True)
class RoutingFigures:
    """Experts picked against those expected.

    Attributes:
        agreement: share of the expected picks that were picked.
        swapped_mass: share of the expected routing weight that lay on experts which were not picked.
        worst_expert, worst_expert_rel_err: of all experts with 8 tokens or more, the one whose tokens have the largest
            median error; -1 and 0 where no expert has as many.
    """

    agreement: float
    swapped_mass: float
    worst_expert: int
    worst_expert_rel_err: float


@dataclass(frozen=True)
class BlockFigures:
    """Everything about one block; overlap is the share of the expected entries that were picked, None without any."""

    streams: StreamFigures
    routing: RoutingFigures
    indexer_overlap: float | None


def compare_block(found: BlockResult, expected: BlockResult) -> BlockFigures:
    """Compare what two runs made of the same tokens."""
    errors = token_errors(found.streams, expected.streams)
    return BlockFigures(
        compare_streams(found.streams, expected.streams, errors),
        compare_routing(found, expected, errors),
        indexer_overlap(found.indexer_topk, expected.indexer_topk),
    )


def token_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative error of each token's streams [T, S, d]: float64 [T]; of a token that should be 0, 0 or infinity.

    NaN and infinity in what was found are an infinite error, so that they count for what they are in any comparison.
    """
    parts = []
    for one, other in _pieces(found, expected):
        error = (one - other).norm(dim=1)
        parts.append(torch.where(error == 0, 0.0, error / other.norm(dim=1)))
    errors = torch.cat(parts)
    return torch.where(errors.isnan(), math.inf, errors)


def _pieces(found: torch.Tensor, expected: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both streams some tokens at a time, float64 [t, S d]: float32 sums of millions drift, by a percent in a Pro."""
    for one, other in zip(torch.split(found, _TOKENS), torch.split(expected, _TOKENS), strict=True):
        yield one.flatten(1).double(), other.flatten(1).double()


def compare_streams(found: torch.Tensor, expected: torch.Tensor, errors: torch.Tensor) -> StreamFigures:
    """Compare streams [T, S, d]; `errors` are their token_errors."""
    equal = (found.view(torch.int16) == expected.view(torch.int16)).flatten(1).all(1)
    if bool(equal.all()):
        return StreamFigures(0.0, 0.0, 0.0, 1.0, 1.0, 0, 0.0)
    own = wanted = apart = product = largest = 0.0
    for one, other in _pieces(found, expected):
        one, other = one.flatten(), other.flatten()
        own, wanted, product = own + float(one @ one), wanted + float(other @ other), product + float(one @ other)
        difference = one.sub_(other)
        apart, largest = apart + float(difference @ difference), max(largest, float(difference.abs_().max()))
    if not math.isfinite(apart):
        own, product, apart, largest = 0.0, 0.0, math.inf, math.inf
    norms = math.sqrt(own) * math.sqrt(wanted)
    worst = int(errors.argmax())
    return StreamFigures(
        rel_err=_ratio(math.sqrt(apart), math.sqrt(wanted)),
        median_rel_err=float(errors.median()),
        max_abs=largest,
        cosine=product / norms if norms else 0.0,
        bit_equal=float(equal.double().mean()),
        worst_token=worst,
        worst_token_rel_err=float(errors[worst]),
    )


def _ratio(error: float, norm: float) -> float:
    """Error over norm; of what should be 0, 0 or infinity."""
    if error == 0:
        return 0.0
    return error / norm if norm else math.inf


def compare_routing(found: BlockResult, expected: BlockResult, errors: torch.Tensor) -> RoutingFigures:
    """Compare the experts that two runs picked; `errors` are those of the tokens' streams."""
    picked = (expected.router_indices[:, :, None] == found.router_indices[:, None]).any(2)  # [T, k]
    mass = expected.router_weights.double()
    worst, worst_error = -1, 0.0
    if bool((errors > 0).any()):
        for expert in torch.unique(expected.router_indices).tolist():
            own = errors[(expected.router_indices == expert).any(1)]
            if len(own) >= _MIN_EXPERT_TOKENS and float(own.median()) > worst_error:
                worst, worst_error = expert, float(own.median())
    return RoutingFigures(
        agreement=float(picked.double().mean()),
        swapped_mass=float((mass * ~picked).sum() / mass.sum()),
        worst_expert=worst,
        worst_expert_rel_err=worst_error,
    )


def indexer_overlap(found: torch.Tensor | None, expected: torch.Tensor | None) -> float | None:
    """Share of the expected entries, int32 [T, K] with -1 for none, that were picked; None without an indexer."""
    if found is None or expected is None:
        return None
    wanted = expected >= 0
    count = int(wanted.sum())
    if not count:
        return 1.0
    rows = zip(torch.split(found, _ROWS), torch.split(expected, _ROWS), torch.split(wanted, _ROWS), strict=True)
    hits = sum(int(((one[:, :, None] == other[:, None]).any(1) & mask).sum()) for one, other, mask in rows)
    return hits / count


# Tokens of streams compared at a time: 7 MB of float64 in a Pro.
_TOKENS = 32
# Rows of picks compared at a time: 64 MB of comparisons at 1,024 picks.
_ROWS = 64
