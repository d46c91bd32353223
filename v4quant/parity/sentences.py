"""The verdict in words."""

from collections.abc import Mapping
from typing import Any

from v4quant.model.arithmetic import Activations
from v4quant.parity.attribution import Blame
from v4quant.parity.compare import Comparison, Task
from v4quant.parity.verdict import MARGIN, MTP_MISSING, NOT_EXECUTED, Departure, Verdict

# Figures as people read them.
FIGURE_NAMES = {
    "isolated_rel_err": "relative error, isolated",
    "isolated_median_rel_err": "relative error of the median token, isolated",
    "isolated_worst_expert_rel_err": "relative error of the worst expert's median token, isolated",
    "accumulated_rel_err": "relative error, accumulated",
    "1 - expert_agreement": "experts picked by one only",
    "swapped_mass": "routing weight on experts picked by one only",
    "1 - indexer_overlap": "indexer picks of one only",
    "kl_mean": "KL divergence, mean",
    "kl_p99": "KL divergence, 99 %",
    "kl_reverse_mean": "reversed KL divergence, mean",
    "1 - top1": "another first choice",
    "1 - top5_overlap": "of the five best not in common",
    "mtp_blocks": "MTP block missing",
}


def in_words(task: Task, comparison: Comparison, who: Blame | None) -> str:
    """A few sentences for people: the verdict, what decides it, and what it does not say."""
    outcome = comparison.outcome
    assert outcome.logits is not None
    found, tokens = outcome.logits.found, f"{outcome.tokens:,} tokens"
    verdict = comparison.judgement.verdict
    if verdict is Verdict.IDENTICAL:
        which = "logits" if outcome.mtp_logits else "next-token logits"
        text = f"The candidate computes the same {which} as the reference, bit by bit, on all {tokens}."
    elif verdict is Verdict.INDISTINGUISHABLE:
        floor = max(own.kl.mean for own in outcome.logits.noise.values())
        whose = "the reference is" if outcome.noise_of == "reference" else "the candidate is"
        text = (
            f"The candidate differs from the reference by no more than {MARGIN:g} times what {whose} from itself when "
            f"sums are taken in another order: mean KL {found.kl.mean:.2g} against {floor:.2g} nats, on {tokens}."
        )
    else:
        text = _different(comparison, who, tokens)
    if task.activations is Activations.STORED:
        text += " Each side was run as its own format would be, so that activations may be rounded on one side alone."
    silent = comparison.coverage.silent
    if silent:
        text += f" Not exercised: {', '.join(silent)}."
    return text


def _different(comparison: Comparison, who: Blame | None, tokens: str) -> str:
    why = describe(comparison.judgement.departures[0])
    text = f"The candidate does not compute what the reference computes, on {tokens}. {why[0].upper()}{why[1:]}."
    if comparison.outcome.mtp_missing:
        return f"{text} The reference has MTP blocks that the candidate has not."
    if who is None or (who.layer is None and who.module is None):
        return f"{text} No single block departs."
    if who.module is None:
        why = (
            "no single module explains it" if comparison.attribution else "only the reference's weights could tell why"
        )
        return f"{text} The first layer to depart: {who.layer}; {why}."
    place = "" if who.layer is None else f" of layer {who.layer}"
    return f"{text} The first to depart: {who.module}{place}."


def describe(departure: Departure) -> str:
    """A figure beyond its limit."""
    if departure.figure == MTP_MISSING:
        return "MTP blocks are missing"
    if departure.figure.startswith(NOT_EXECUTED):
        return (
            f"{departure.where} did not run as its config says, {departure.found:.3g} of it amiss: {departure.figure}"
        )
    return (
        f"{departure.where}: {FIGURE_NAMES.get(departure.figure, departure.figure)} is {departure.found:.3g}, "
        f"{departure.times:.1f} times its limit of {departure.limit:.3g}"
    )


def describe_ranks(ranks: Mapping[str, Any]) -> str:
    """Who ran a sharded checkpoint: "2 ranks (--tp 2 --ep 1 --pp 1), threads of one process"."""
    how = "threads of one process" if ranks["how"] == "virtual" else "a process each"
    return f"{ranks['ranks']:,} ranks (--tp {ranks['tp']} --ep {ranks['ep']} --pp {ranks['pp']}), {how}"
