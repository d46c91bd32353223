"""Compare next-token logits of several runs in one pass over the vocabulary matrices, which are read once.

    KL(p || q) = sum_v p_v (a_v - b_v) - log Z_a + log Z_b,   p_v = exp(a_v) / Z_a,   a and b the logits

Sums are taken piece by piece with a running maximum, in float64, so that equal logits give exactly 0. T tokens, V
vocabulary; memory is some pieces of [T, 8192].
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from v4quant.errors import CheckFailedError
from v4quant.model.head import AnyHead, Piece
from v4quant.model.operations import Operations
from v4quant.model.reordered import Reordered

_TOP = 5
NO_TARGET = -1


@dataclass(frozen=True)
class Spread:
    """A figure of every token, summed up."""

    mean: float
    median: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: torch.Tensor) -> "Spread":
        """Of float64 [T]."""
        p99 = float(torch.quantile(values, 0.99))  # NaN between two infinities
        return cls(
            float(values.mean()), float(values.median()), math.inf if math.isnan(p99) else p99, float(values.max())
        )


@dataclass(frozen=True)
class LogitFigures:
    """Logits against those expected.

    Attributes:
        tokens: T.
        bit_equal: share of tokens whose logits are all equal bit by bit.
        kl: KL(expected || found) over tokens, in nats; kl_reverse: KL(found || expected).
        top1: share of tokens with the same best next token; top5_overlap: of the five best, the share in common.
        perplexity_expected, perplexity_found: of the tokens that follow; None where none does.
        kl_by_token: KL(expected || found) of each; top1_by_token: whether both have the same best next token.
    """

    tokens: int
    bit_equal: float
    kl: Spread
    kl_reverse: Spread
    top1: float
    top5_overlap: float
    perplexity_expected: float | None
    perplexity_found: float | None
    kl_by_token: list[float]
    top1_by_token: list[bool]


@dataclass(frozen=True)
class Collapsed:
    """What a run brings to the vocabulary matrix of a head.

    Attributes:
        head: whose matrix it is.
        x: float32 [T, d].
        ops: of the run.
    """

    head: AnyHead
    x: torch.Tensor
    ops: Operations

    @classmethod
    def of(cls, head: AnyHead, streams: torch.Tensor, ops: Operations) -> "Collapsed":
        """From streams, activations [T, S, d]."""
        return cls(head, head.collapse(streams, ops), ops)


def logit_pieces(runs: Sequence[Collapsed]) -> Iterator[list[torch.Tensor]]:
    """Logits of several runs through one or more heads, float32 [T, some] of every run, piece by piece.

    Each piece of a vocabulary matrix is read once. Runs that bring the same numbers to equal pieces share one tensor.
    """
    heads = list(dict.fromkeys(run.head for run in runs))
    for pieces in zip(*(head.pieces() for head in heads), strict=True):
        weights = dict(zip(heads, pieces, strict=True))
        made: list[torch.Tensor] = []
        for run in runs:
            shared = (own for own, other in zip(made, runs, strict=False) if _alike(run, other, weights))
            own = next(shared, None)
            made.append(run.head.product(run.x, weights[run.head], run.ops) if own is None else own)
        yield made


def _alike(one: Collapsed, other: Collapsed, weights: Mapping[AnyHead, Piece]) -> bool:
    """True if both give the same logits from these pieces."""
    return (
        _computes_alike(one.ops, other.ops)
        and torch.equal(one.x, other.x)
        and (one.head is other.head or _equal(weights[one.head], weights[other.head]))
    )


def _equal(one: Piece, other: Piece) -> bool:
    """True if two pieces are known to be equal: of those that ranks hold nothing is known here."""
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)


def _computes_alike(one: Operations, other: Operations) -> bool:
    return isinstance(one, Reordered) == isinstance(other, Reordered)


def next_tokens(prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The token that follows each, int64 [T], prompt behind prompt; NO_TARGET behind the last of a prompt."""
    end = torch.tensor([NO_TARGET])
    return torch.cat([torch.cat([prompt[1:].cpu(), end]) for prompt in prompts])


def _best_of(piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The five best logits of a piece [T, some] and where they are; of equal ones the first."""
    count = min(_TOP, piece.shape[1])
    values, places = piece.topk(count, 1)
    # Where more are as good as the last of the five, topk takes any of them.
    crowded = ((piece >= values[:, -1:]).sum(1) > count).nonzero()[:, 0]
    places[crowded] = piece[crowded].argsort(dim=1, descending=True, stable=True)[:, :count]
    return values, places


class Tally:
    """What has to be known of one run's logits: normaliser, best tokens, the logit of the token that follows."""

    def __init__(self, targets: torch.Tensor) -> None:
        count = len(targets)
        self._targets = targets
        self.largest = torch.full((count,), -torch.inf, dtype=torch.float64)
        self.total = torch.zeros(count, dtype=torch.float64)
        self.decay = torch.ones(count, dtype=torch.float64)
        self.weight = torch.empty(0)
        self._best = torch.full((count, 0), -torch.inf)
        self._ids = torch.zeros(count, 0, dtype=torch.int64)
        self._target_logit = torch.full((count,), torch.nan, dtype=torch.float64)
        self._first = 0

    def add(self, piece: torch.Tensor) -> None:
        """Take in logits float32 [T, some]; `weight` is exp(logit - largest) of them until the next piece."""
        larger = torch.maximum(self.largest, piece.amax(1).double())
        self.decay = torch.exp(self.largest - larger)
        self.weight = torch.exp(piece - larger.float()[:, None])
        # The running maximum is a float32 number, so the shift is exact.
        self.total = self.total * self.decay + self.weight.sum(1, dtype=torch.float64)
        self.largest = larger
        self._keep_best(piece)
        here = (self._targets >= self._first) & (self._targets < self._first + piece.shape[1])
        rows = here.nonzero()[:, 0]
        self._target_logit[rows] = piece[rows, self._targets[rows] - self._first].double()
        self._first += piece.shape[1]

    def _keep_best(self, piece: torch.Tensor) -> None:
        best, places = _best_of(piece)
        values = torch.cat([self._best, best], 1)
        ids = torch.cat([self._ids, places + self._first], 1)
        # Of equal logits the smaller token comes first, whatever the pieces were: sort by token, then by logit.
        order = ids.argsort(dim=1, stable=True)
        values, ids = values.gather(1, order), ids.gather(1, order)
        order = values.argsort(dim=1, descending=True, stable=True)[:, :_TOP]
        self._best, self._ids = values.gather(1, order), ids.gather(1, order)

    @property
    def log_total(self) -> torch.Tensor:
        """log of the sum of exp(logit): float64 [T]."""
        return self.largest + self.total.log()

    @property
    def best(self) -> torch.Tensor:
        """The five best tokens, best first: int64 [T, 5]."""
        return self._ids

    def perplexity(self) -> float | None:
        """exp of the mean of -log p(token that follows)."""
        known = self._targets != NO_TARGET
        if not bool(known.any()):
            return None
        return float((self.log_total - self._target_logit)[known].mean().exp())


class Pair:
    """Two runs, piece by piece: p-weighted differences of their logits."""

    def __init__(self, found: Tally, expected: Tally) -> None:
        self._found, self._expected = found, expected
        self._forward = torch.zeros_like(expected.total)
        self._reverse = torch.zeros_like(expected.total)
        self._equal = torch.ones(len(expected.total), dtype=torch.bool)

    def add(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Take in logits float32 [T, some] of both, which their tallies have taken in."""
        if found is expected:
            self._forward *= self._expected.decay
            self._reverse *= self._found.decay
            return
        self._equal &= (found.view(torch.int32) == expected.view(torch.int32)).all(1)
        difference = expected - found
        ahead = (self._expected.weight * difference).sum(1, dtype=torch.float64)
        behind = -(self._found.weight * difference).sum(1, dtype=torch.float64)
        self._forward = self._forward * self._expected.decay + ahead
        self._reverse = self._reverse * self._found.decay + behind

    @staticmethod
    def _divergence(kl: torch.Tensor) -> torch.Tensor:
        """KL is never negative, what is left below zero is rounding; and infinite where logits are no numbers."""
        return torch.where(kl.isnan(), torch.inf, kl).clamp(min=0.0)

    def figures(self) -> LogitFigures:
        """What came of it."""
        found, expected = self._found, self._expected
        shift = expected.log_total - found.log_total
        kl = self._divergence(self._forward / expected.total - shift)
        kl_reverse = self._divergence(self._reverse / found.total + shift)
        same = found.best[:, 0] == expected.best[:, 0]
        common = (found.best[:, :, None] == expected.best[:, None]).any(2)
        return LogitFigures(
            tokens=len(kl),
            bit_equal=float(self._equal.double().mean()),
            kl=Spread.of(kl),
            kl_reverse=Spread.of(kl_reverse),
            top1=float(same.double().mean()),
            top5_overlap=float(common.double().mean()),
            perplexity_expected=expected.perplexity(),
            perplexity_found=found.perplexity(),
            kl_by_token=kl.tolist(),
            top1_by_token=same.tolist(),
        )


def compare_logits(
    pieces: Iterator[list[torch.Tensor]], pairs: Sequence[tuple[int, int]], targets: torch.Tensor
) -> list[LogitFigures]:
    """Compare logits of several runs.

    Args:
        pieces: float32 [T, some] of every run, in the order of the vocabulary.
        pairs: which runs to compare: found, expected.
        targets: int64 [T], the token that follows each, NO_TARGET for none.

    Raises:
        CheckFailedError: if logits that the first pair expects are NaN or infinite.
    """
    tallies: list[Tally] = []
    compared: list[Pair] = []
    for piece in pieces:
        logits = [run.cpu() for run in piece]
        if not tallies:
            tallies = [Tally(targets) for _ in logits]
            compared = [Pair(tallies[found], tallies[expected]) for found, expected in pairs]
        for tally, own in zip(tallies, logits, strict=True):
            tally.add(own)
        for pair, (found, expected) in zip(compared, pairs, strict=True):
            pair.add(logits[found], logits[expected])
    _require_finite(tallies[pairs[0][1]])
    return [pair.figures() for pair in compared]


def _require_finite(reference: Tally) -> None:
    wrong = int((~reference.log_total.isfinite()).sum())
    if wrong:
        raise CheckFailedError(
            f"the reference's logits of {wrong:,} of {len(reference.log_total):,} tokens are NaN or infinite: nothing "
            "can be compared with them",
            hint="Look at the weights of its head.",
        )
