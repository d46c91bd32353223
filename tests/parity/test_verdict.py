"""The rules on outcomes made by hand: what is identical, where each limit lies, what comes first."""

import math
from dataclasses import replace
from typing import Any

import pytest

from v4quant.parity.execution import Executed
from v4quant.parity.figures import BlockFigures, RoutingFigures, StreamFigures
from v4quant.parity.lockstep import BlockOutcome, LogitOutcome, Outcome
from v4quant.parity.logits import LogitFigures, Spread
from v4quant.parity.runs import CHUNKS, ORDER
from v4quant.parity.verdict import (
    MARGIN,
    MTP_MISSING,
    NOT_EXECUTED,
    Departure,
    Judgement,
    Verdict,
    block_limits,
    blocks_of,
    judge,
)

TOKENS = 100
STEP = 2.0**-8  # half a BF16 step, as the noise is the reference's
# Figure of a block -> how the figures' objects call it, and its resolution by the documented rules.
BLOCK_FIGURES = {
    "isolated_rel_err": ("rel_err", STEP),
    "isolated_median_rel_err": ("median_rel_err", STEP),
    "isolated_worst_expert_rel_err": ("worst_expert_rel_err", STEP),
    "1 - expert_agreement": ("agreement", 1 / TOKENS),
    "swapped_mass": ("swapped_mass", 1 / TOKENS),
    "1 - indexer_overlap": ("indexer_overlap", 1 / TOKENS),
}
LOGIT_FIGURES = {
    "kl_mean": ("kl", "mean", 1e-4),
    "kl_p99": ("kl", "p99", 1e-3),
    "kl_reverse_mean": ("kl_reverse", "mean", 1e-4),
    "1 - top1": ("top1", "", 1 / TOKENS),
    "1 - top5_overlap": ("top5_overlap", "", 1 / TOKENS),
}


def block_figures(figure: str = "", value: float = 0.0, overlap: float | None = 1.0) -> BlockFigures:
    """Figures without any error but one."""
    streams, routing = StreamFigures(0.0, 0.0, 0.0, 1.0, 1.0, 0, 0.0), RoutingFigures(1.0, 0.0, -1, 0.0)
    name = BLOCK_FIGURES[figure][0] if figure else ""
    found: Any = 1 - value if figure.startswith("1 - ") else value
    if name == "indexer_overlap":
        overlap = found
    elif name in StreamFigures.__dataclass_fields__:
        streams = replace(streams, **{"bit_equal": 0.0, name: found})
    elif name:
        routing = replace(routing, **{name: found})
    return BlockFigures(streams, routing, overlap)


def block(name: str = "layer 0", isolated: BlockFigures | None = None, **options: Any) -> BlockOutcome:
    """A block in which nothing happened, but for what is given; noise as {variant: (isolated, accumulated)}."""
    nothing = block_figures()
    values: dict[str, Any] = {
        "accumulated": nothing,
        "noise": {ORDER: (nothing, nothing), CHUNKS: (nothing, nothing)},
        "executed": [],
    }
    values |= {"experts_seen": 8, "clamped": 0, "seconds": 0.0, "bytes_read": 0, "ratio": 4}
    return BlockOutcome(name=name, isolated=isolated or nothing, **(values | options))


def noisy(figures: BlockFigures, variant: str = ORDER, accumulated: BlockFigures | None = None) -> dict[str, Any]:
    nothing = block_figures()
    noise = {ORDER: (nothing, nothing), CHUNKS: (nothing, nothing)}
    return {"noise": noise | {variant: (figures, accumulated or nothing)}}


def logit_figures(figure: str = "", value: float = 0.0, bit_equal: float = 0.0) -> LogitFigures:
    zero = Spread(0.0, 0.0, 0.0, 0.0)
    found = LogitFigures(TOKENS, bit_equal, zero, zero, 1.0, 1.0, None, None, [], [])
    if not figure:
        return found
    name, part, _ = LOGIT_FIGURES[figure]
    own: Any = 1 - value if figure.startswith("1 - ") else replace(zero, **{part: value})
    return replace(found, **{name: own})


def logits(found: LogitFigures | None = None, variant: str = ORDER, noise: LogitFigures | None = None) -> LogitOutcome:
    own = {ORDER: logit_figures(), CHUNKS: logit_figures()} | ({variant: noise} if noise else {})
    return LogitOutcome(found or logit_figures(), None, own)


def outcome(*layers: BlockOutcome, **options: Any) -> Outcome:
    """An outcome in which nothing departs, but for what is given; its logits are not bit-equal."""
    values: dict[str, Any] = {"embedding": block_figures().streams, "logits": logits()} | options
    return Outcome(tokens=TOKENS, noise_of="reference", layers=list(layers) or [block()], **values)


def only_departure(judgement: Judgement) -> Departure:
    assert judgement.verdict is Verdict.DIFFERENT
    (departure,) = judgement.departures
    return departure


BIT_EQUAL = logits(logit_figures(bit_equal=1.0))
ALMOST = logits(logit_figures(bit_equal=math.nextafter(1.0, 0.0)))


def test_identical_is_every_logit_bit_by_bit() -> None:
    assert judge(outcome(logits=BIT_EQUAL)).verdict is Verdict.IDENTICAL
    assert judge(outcome(logits=BIT_EQUAL, mtp=block("mtp 0"), mtp_logits=BIT_EQUAL)).verdict is Verdict.IDENTICAL
    for wrong in (
        outcome(logits=ALMOST),
        outcome(logits=ALMOST, mtp=block("mtp 0"), mtp_logits=BIT_EQUAL),
        outcome(logits=BIT_EQUAL, mtp=block("mtp 0"), mtp_logits=ALMOST),
    ):
        assert judge(wrong) == Judgement(Verdict.INDISTINGUISHABLE, judge(wrong).limits, [])


def test_a_missing_mtp_block_is_different_whatever_the_logits() -> None:
    departure = only_departure(judge(outcome(logits=BIT_EQUAL, mtp_missing=True)))
    assert departure == Departure(MTP_MISSING, "config.json", 1.0, 0.0)
    assert departure.times == math.inf


@pytest.mark.parametrize("counted", [0, 99, 101])
@pytest.mark.parametrize("where", ["layer 0", "mtp 0"])
def test_what_did_not_run_is_different_whatever_the_logits(where: str, counted: int) -> None:
    wrong = block(where, executed=[Executed("tokens", 100, 100), Executed("experts", counted, 100)])
    blocks = {"mtp": wrong, "mtp_logits": BIT_EQUAL} if where == "mtp 0" else {}
    departure = only_departure(judge(outcome(*([] if blocks else [wrong]), logits=BIT_EQUAL, **blocks)))
    assert (departure.figure, departure.where) == (f"{NOT_EXECUTED} experts", where)
    assert departure.found == pytest.approx(abs(counted - 100) / 100)


def test_everything_that_has_to_run_ran() -> None:
    ran = block(executed=[Executed("tokens", 100, 100), Executed("nothing", 0, 0)])
    assert judge(outcome(ran, logits=BIT_EQUAL)).verdict is Verdict.IDENTICAL
    more = block(executed=[Executed("nothing", 3, 0)])
    assert only_departure(judge(outcome(more))).found == 3.0


def at_most(limit: float, figure: str) -> float:
    """The largest figure that is no departure: for shares, whose complement is kept, the last that rounds to it."""
    if not figure.startswith("1 - "):
        return limit
    value = limit
    while 1 - (1 - value) > limit:
        value = math.nextafter(value, 0.0) if value < 1e-17 else value - 2.0**-54
    return value


def one_more(limit: float, figure: str) -> float:
    """The next figure: one ulp more, or for shares one ulp of the complement."""
    return at_most(limit, figure) + 2.0**-52 if figure.startswith("1 - ") else math.nextafter(limit, math.inf)


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("variant", [ORDER, CHUNKS])
@pytest.mark.parametrize("figure", BLOCK_FIGURES)
def test_each_figure_of_a_block_at_its_limit_and_beyond(figure: str, variant: str, floor: float) -> None:
    """The noise is seen in another layer; one ulp decides."""
    noise = noisy(block_figures(figure, floor), variant)
    seen = 1 - (1 - floor) if figure.startswith("1 - ") else floor
    limit = MARGIN * max(seen, BLOCK_FIGURES[figure][1])
    for value, verdict in (
        (at_most(limit, figure), Verdict.INDISTINGUISHABLE),
        (one_more(limit, figure), Verdict.DIFFERENT),
    ):
        found = judge(outcome(block(), block("layer 1", block_figures(figure, value)), block("layer 2", **noise)))
        assert found.limits[figure] == limit
        assert found.verdict is verdict, value
        if verdict is Verdict.DIFFERENT:
            departure = only_departure(found)
            assert (departure.figure, departure.where, departure.limit) == (figure, "layer 1", limit)
            assert departure.found > limit
            assert departure.times == pytest.approx(1.0)


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("variant", [ORDER, CHUNKS])
@pytest.mark.parametrize("head", ["logits", "mtp_logits"])
@pytest.mark.parametrize("figure", LOGIT_FIGURES)
def test_each_figure_of_logits_at_its_limit_and_beyond(figure: str, head: str, variant: str, floor: float) -> None:
    seen = 1 - (1 - floor) if figure.startswith("1 - ") else floor
    limit = MARGIN * max(seen, LOGIT_FIGURES[figure][2])
    noise = logit_figures(figure, floor)
    for value, verdict in (
        (at_most(limit, figure), Verdict.INDISTINGUISHABLE),
        (one_more(limit, figure), Verdict.DIFFERENT),
    ):
        own = {head: logits(logit_figures(figure, value), variant, noise)}
        found = judge(outcome(mtp=block("mtp 0"), **({"mtp_logits": logits()} | own)))
        assert found.limits[f"{head} {figure}"] == limit
        assert found.verdict is verdict, value
        if verdict is Verdict.DIFFERENT:
            assert only_departure(found).where == head
            assert only_departure(found).figure == figure


def test_each_head_has_noise_of_its_own() -> None:
    quiet, loud = logits(), logits(noise=logit_figures("kl_mean", 0.5))
    found = judge(outcome(logits=quiet, mtp=block("mtp 0"), mtp_logits=loud))
    assert found.limits["logits kl_mean"] == MARGIN * 1e-4
    assert found.limits["mtp_logits kl_mean"] == 1.5


@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_the_embedding_and_the_last_layer(floor: float) -> None:
    """The embedding is held to the noise of blocks; what has accumulated, to what accumulates in the variants."""
    figures = block_figures("isolated_rel_err", floor)
    limit = MARGIN * max(STEP, floor)
    for value, verdict in ((limit, Verdict.INDISTINGUISHABLE), (math.nextafter(limit, 1), Verdict.DIFFERENT)):
        own = block_figures("isolated_rel_err", value)
        embedding = judge(outcome(block(**noisy(figures)), embedding=own.streams))
        last = block("layer 1", accumulated=own, **noisy(block_figures(), CHUNKS, figures))
        accumulated = judge(outcome(block(), last))
        assert accumulated.limits["accumulated_rel_err"] == limit
        for found, departure in (
            (embedding, Departure("isolated_rel_err", "embedding", value, limit)),
            (accumulated, Departure("accumulated_rel_err", "layer 1", value, limit)),
        ):
            assert found.verdict is verdict
            assert found.departures == ([departure] if verdict is Verdict.DIFFERENT else [])


def test_what_accumulates_is_judged_at_the_end_alone() -> None:
    far = block_figures("isolated_rel_err", 0.9)
    assert judge(outcome(block(accumulated=far), block("layer 1"))).verdict is Verdict.INDISTINGUISHABLE
    # Noise that accumulates in another layer excuses nothing at the end.
    noise = noisy(block_figures(), ORDER, far)
    assert judge(outcome(block(**noise), block("layer 1", accumulated=far))).verdict is Verdict.DIFFERENT


def test_accumulated_noise_is_no_isolated_noise() -> None:
    far = block_figures("isolated_rel_err", 0.5)
    found = judge(outcome(block(isolated=far, accumulated=far, **noisy(block_figures(), ORDER, far))))
    assert [departure.figure for departure in found.departures] == ["isolated_rel_err"]


def test_floors_are_pooled_over_all_blocks_and_the_mtp_block() -> None:
    figures = block_figures("isolated_rel_err", 0.1)
    layers = [block(f"layer {number}") for number in range(3)]
    for number in range(3):
        pooled = [*layers[:number], block(f"layer {number}", **noisy(figures)), *layers[number + 1 :]]
        assert judge(outcome(*pooled)).limits["isolated_rel_err"] == pytest.approx(0.3)
    mtp = block("mtp 0", **noisy(figures))
    assert judge(outcome(*layers, mtp=mtp, mtp_logits=logits())).limits["isolated_rel_err"] == pytest.approx(0.3)
    assert block_limits(layers, TOKENS, STEP)["isolated_rel_err"] == MARGIN * STEP


def test_an_expert_may_have_the_noise_of_a_whole_block() -> None:
    found = judge(outcome(block(**noisy(block_figures("isolated_rel_err", 0.1)))))
    assert found.limits["isolated_worst_expert_rel_err"] == pytest.approx(0.3)
    other = judge(outcome(block(**noisy(block_figures("isolated_worst_expert_rel_err", 0.1)))))
    assert other.limits["isolated_rel_err"] == MARGIN * STEP


def test_the_resolution_of_shares_is_one_token() -> None:
    for tokens in (1, 10, 5000):
        limits = block_limits([block()], tokens, STEP)
        assert limits["1 - expert_agreement"] == limits["swapped_mass"] == MARGIN * (1 / tokens)
        assert limits["1 - indexer_overlap"] == MARGIN * (1 / tokens)


def test_figures_that_are_not_judged() -> None:
    """The largest KL and token, cosine, single numbers; a block whose reference is not known."""
    figures = block_figures()
    streams = replace(figures.streams, max_abs=9.0, cosine=0.0, bit_equal=0.0, worst_token_rel_err=math.inf)
    unknown = replace(block("mtp 0"), isolated=None, accumulated=None)
    kl = logits(replace(logit_figures(), kl=Spread(0.0, 0.0, 0.0, 50.0), kl_by_token=[50.0]))
    found = judge(outcome(block(isolated=replace(figures, streams=streams)), logits=kl, mtp=unknown, mtp_logits=kl))
    assert found.verdict is Verdict.INDISTINGUISHABLE


def test_blocks_without_an_indexer() -> None:
    found = judge(outcome(block(isolated=block_figures(overlap=None), **noisy(block_figures(overlap=None)))))
    assert found.verdict is Verdict.INDISTINGUISHABLE


def test_nan_comes_before_what_is_known() -> None:
    layers = [
        block(f"layer {number}", block_figures("swapped_mass", value)) for number, value in enumerate((0.9, math.nan))
    ]
    assert [departure.where for departure in judge(outcome(*layers)).departures] == ["layer 1", "layer 0"]


def test_nan_elsewhere() -> None:
    far = block_figures("isolated_rel_err", math.nan)
    assert judge(outcome(embedding=far.streams)).verdict is Verdict.DIFFERENT
    assert judge(outcome(block(accumulated=far))).verdict is Verdict.DIFFERENT
    assert judge(outcome(block(**noisy(far)))).limits["isolated_rel_err"] == MARGIN * STEP


@pytest.mark.parametrize("figure", BLOCK_FIGURES)
def test_nan_is_beyond_every_limit(figure: str) -> None:
    assert judge(outcome(block(isolated=block_figures(figure, math.nan)))).verdict is Verdict.DIFFERENT


@pytest.mark.parametrize("figure", LOGIT_FIGURES)
def test_nan_in_logits_is_beyond_every_limit(figure: str) -> None:
    assert judge(outcome(logits=logits(logit_figures(figure, math.nan)))).verdict is Verdict.DIFFERENT


def test_departures_come_worst_first_and_what_is_missing_before_all() -> None:
    slight, worst = block_figures("isolated_rel_err", 0.1), block_figures("swapped_mass", 0.9)
    broken = block("layer 2", executed=[Executed("experts", 1, 2)])
    found = judge(
        outcome(
            block(isolated=slight),
            block("layer 1", isolated=worst),
            broken,
            logits=logits(logit_figures("kl_mean", 0.01)),
            mtp_missing=True,
        )
    )
    assert found.verdict is Verdict.DIFFERENT
    assert [(departure.figure, departure.where) for departure in found.departures] == [
        (MTP_MISSING, "config.json"),
        (f"{NOT_EXECUTED} experts", "layer 2"),
        ("kl_mean", "logits"),  # 33 times its limit
        ("swapped_mass", "layer 1"),  # 30 times
        ("isolated_rel_err", "layer 0"),  # 4 times
    ]
    assert found.departing_blocks(outcome(block(), block("layer 1"), broken)) == ["layer 0", "layer 1"]


def test_departing_blocks_are_in_the_order_of_the_model() -> None:
    isolated = [block_figures("isolated_rel_err", value) for value in (0.1, 0.9, 0.0, 0.5)]
    layers = [block(f"layer {number}", figures) for number, figures in enumerate(isolated)]
    own = outcome(*layers, mtp=block("mtp 0", isolated[1]), mtp_logits=logits())
    assert judge(own).departing_blocks(own) == ["layer 0", "layer 1", "layer 3", "mtp 0"]
    last = outcome(block(), block("layer 1", accumulated=isolated[1]), embedding=isolated[1].streams)
    assert judge(last).departing_blocks(last) == [], "neither the embedding nor what accumulated is a block's own"


def test_blocks_are_the_layers_and_then_the_mtp_block() -> None:
    own = outcome(block(), block("layer 1"), mtp=block("mtp 0"))
    assert [one.name for one in blocks_of(own)] == ["layer 0", "layer 1", "mtp 0"]
    assert [one.name for one in blocks_of(outcome())] == ["layer 0"]
