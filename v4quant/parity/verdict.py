"""The rules: what counts as noise, and what verdict follows. docs/parity.md says the same with the measurements.

    floor(figure) = the largest that the variants show, over all blocks where it is one of a block
    limit(figure) = 3 x the larger of floor and resolution

A figure's floor is taken over all blocks because noise comes in events: a last bit moves one FP8 step of one entry, and
every token that sees it differs by some percent; which layer has such an event is chance. The resolution is what no
comparison of BF16 outputs can tell from nothing: one BF16 step, one token, one pick. Runs that are far from themselves
at every second token have another fault than the order of sums, and get no verdict but `different`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from v4quant.parity.figures import BlockFigures
from v4quant.parity.lockstep import BlockOutcome, LogitOutcome, Outcome
from v4quant.parity.logits import LogitFigures

MARGIN = 3.0
# BF16 has 7 bits behind the point: the step from 1 to the next number.
BF16_STEP = 2.0**-7
# More than that at every second token is no matter of the order of sums; measured: 0.005 at most.
NOISE_CAP = 4 * BF16_STEP
NOISE = "median noise, "
MTP_MISSING, NOT_EXECUTED = "mtp_blocks", "not executed as configured:"
# Nats. Below these no difference counts, even in a run so short that its own noise does not show.
KL_MEAN, _KL_P99 = 1e-4, 1e-3


class Verdict(StrEnum):
    """What a comparison says."""

    IDENTICAL = "identical"  # all logits bit-equal
    INDISTINGUISHABLE = "indistinguishable"  # every figure within its limit
    DIFFERENT = "different"


@dataclass(frozen=True)
class Departure:
    """A figure beyond its limit.

    Attributes:
        figure: its name in parity.json; "1 - top1" and the like where larger is better.
        where: block or head.
        found, limit: both as the figure counts, larger is worse.
    """

    figure: str
    where: str
    found: float
    limit: float

    @property
    def times(self) -> float:
        """Found over limit."""
        return math.inf if not self.limit or math.isnan(self.found) else self.found / self.limit


@dataclass
class Judgement:
    """What the rules make of an outcome.

    Attributes:
        verdict: see Verdict.
        limits: by figure, of blocks, logits and MTP logits: "isolated_rel_err", "logits kl_mean", ...
        departures: worst first.
    """

    verdict: Verdict
    limits: dict[str, float]
    departures: list[Departure] = field(default_factory=list)

    def departing_blocks(self, outcome: Outcome) -> list[str]:
        """Blocks with an isolated figure beyond its limit, in the order of the model."""
        named = {
            departure.where
            for departure in self.departures
            if departure.figure in (*_ERRORS, *_SHARES) or departure.figure.startswith(NOISE)
        }
        return [block.name for block in blocks_of(outcome) if block.name in named]


# Figures of a block that are judged in isolation: errors, and shares of tokens or picks.
_ERRORS = ("isolated_rel_err", "isolated_median_rel_err", "isolated_worst_expert_rel_err")
_SHARES = ("1 - expert_agreement", "swapped_mass", "1 - indexer_overlap")


def blocks_of(outcome: Outcome) -> list[BlockOutcome]:
    """Layers, and the MTP block where one ran."""
    return [*outcome.layers, *([outcome.mtp] if outcome.mtp else [])]


def block_figures(figures: BlockFigures) -> dict[str, float]:
    """The judged figures of a block; larger is worse."""
    found = {
        "isolated_rel_err": figures.streams.rel_err,
        "isolated_median_rel_err": figures.streams.median_rel_err,
        "isolated_worst_expert_rel_err": figures.routing.worst_expert_rel_err,
        "1 - expert_agreement": 1 - figures.routing.agreement,
        "swapped_mass": figures.routing.swapped_mass,
    }
    if figures.indexer_overlap is not None:
        found["1 - indexer_overlap"] = 1 - figures.indexer_overlap
    return found


def logit_figures(figures: LogitFigures) -> dict[str, float]:
    """The judged figures of logits; larger is worse.

    The largest KL is reported and not judged: the largest of a few hundred tokens in two runs bounds nothing.
    """
    return {
        "kl_mean": figures.kl.mean,
        "kl_p99": figures.kl.p99,
        "kl_reverse_mean": figures.kl_reverse.mean,
        "1 - top1": 1 - figures.top1,
        "1 - top5_overlap": 1 - figures.top5_overlap,
    }


def _beyond(value: float, limit: float) -> bool:
    """True above the limit, and for NaN and infinity, which are within none."""
    return not (math.isfinite(value) and value <= limit)


def judge(outcome: Outcome) -> Judgement:
    """Apply the rules."""
    resolution = resolution_of(outcome.noise_of)
    limits = block_limits(blocks_of(outcome), outcome.tokens, resolution)
    departures = [
        Departure(figure, block.name, value, limits[figure])
        for block in blocks_of(outcome)
        if block.isolated is not None
        for figure, value in block_figures(block.isolated).items()
        if _beyond(value, limits[figure])
    ]
    departures += [
        Departure(f"{NOISE}{name}", block.name, isolated.streams.median_rel_err, NOISE_CAP)
        for block in blocks_of(outcome)
        for name, (isolated, _) in block.noise.items()
        if _beyond(isolated.streams.median_rel_err, NOISE_CAP)
    ]
    if _beyond(outcome.embedding.rel_err, limits["isolated_rel_err"]):
        found = outcome.embedding.rel_err
        departures.append(Departure("isolated_rel_err", "embedding", found, limits["isolated_rel_err"]))
    last = outcome.layers[-1]
    limits["accumulated_rel_err"] = MARGIN * max(
        resolution, *(accumulated.streams.rel_err for _, accumulated in last.noise.values())
    )
    if last.accumulated is not None and _beyond(last.accumulated.streams.rel_err, limits["accumulated_rel_err"]):
        found = last.accumulated.streams.rel_err
        departures.append(Departure("accumulated_rel_err", last.name, found, limits["accumulated_rel_err"]))
    for name, logits in _heads(outcome):
        own = _logit_limits(logits)
        limits |= {f"{name} {figure}": limit for figure, limit in own.items()}
        departures += [
            Departure(figure, name, value, own[figure])
            for figure, value in logit_figures(logits.found).items()
            if _beyond(value, own[figure])
        ]
    missing = list(_missing(outcome))
    departures = missing + sorted(departures, key=lambda departure: -departure.times)
    verdict = _verdict(outcome, missing, departures)
    # Where all logits are equal, what lies beside them (a noise beyond its cap, for one) is no departure.
    return Judgement(verdict, limits, [] if verdict is Verdict.IDENTICAL else departures)


def _missing(outcome: Outcome) -> Iterator[Departure]:
    """What the candidate did not run, as a share of what it has to; no noise excuses that."""
    if outcome.mtp_missing:
        yield Departure(MTP_MISSING, "config.json", 1.0, 0.0)
    for block in blocks_of(outcome):
        for item in block.executed:
            if item.counted != item.expected:
                share = abs(item.counted - item.expected) / max(item.expected, 1)
                yield Departure(f"{NOT_EXECUTED} {item.what}", block.name, share, 0.0)


def resolution_of(noise_of: str) -> float:
    """Relative error below which nothing counts.

    A reference that runs alongside rounds on the same machine, where a last bit moves a number by half a BF16 step;
    stored outputs come from another machine and other code, whose own last bit adds as much.
    """
    return BF16_STEP / 2 if noise_of == "reference" else BF16_STEP


def block_limits(blocks: list[BlockOutcome], tokens: int, resolution: float) -> dict[str, float]:
    """Limits of isolated figures, by what the variants of these blocks show.

    Args:
        tokens: of the run; the resolution of shares is one of them.
        resolution: of errors.
    """
    floors = dict.fromkeys(_ERRORS, resolution) | dict.fromkeys(_SHARES, 1 / tokens)
    for block in blocks:
        for isolated, _ in block.noise.values():
            for figure, value in block_figures(isolated).items():
                floors[figure] = max(floors[figure], value)
    # One event can lie under every token of an expert, so its median has the noise of the whole block.
    floors["isolated_worst_expert_rel_err"] = max(floors["isolated_worst_expert_rel_err"], floors["isolated_rel_err"])
    return {figure: MARGIN * floor for figure, floor in floors.items()}


def _logit_limits(logits: LogitOutcome) -> dict[str, float]:
    token = 1 / logits.found.tokens
    resolutions = {"kl_mean": KL_MEAN, "kl_p99": _KL_P99, "kl_reverse_mean": KL_MEAN}
    noise = [logit_figures(figures) for figures in logits.noise.values()]
    return {
        figure: MARGIN * max(resolutions.get(figure, token), *(own[figure] for own in noise))
        for figure in logit_figures(logits.found)
    }


def _heads(outcome: Outcome) -> Iterator[tuple[str, LogitOutcome]]:
    if outcome.logits is not None:
        yield "logits", outcome.logits
    if outcome.mtp_logits is not None:
        yield "mtp_logits", outcome.mtp_logits


def _verdict(outcome: Outcome, missing: list[Departure], departures: list[Departure]) -> Verdict:
    if not missing and all(logits.found.bit_equal == 1.0 for _, logits in _heads(outcome)):
        return Verdict.IDENTICAL
    return Verdict.DIFFERENT if departures else Verdict.INDISTINGUISHABLE
