"""A comparison as one JSON object: what `--json` prints, `parity.json` holds and the report shows."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from v4quant.checkpoint.reader import Checkpoint
from v4quant.parity.attribution import Blame, blame
from v4quant.parity.compare import Comparison, Task
from v4quant.parity.conversations import conversations_json
from v4quant.parity.coverage import Coverage
from v4quant.parity.evidence import bytes_by_role, config_differences, describe, machine, versions
from v4quant.parity.execution import CSA, HCA
from v4quant.parity.lockstep import BlockOutcome
from v4quant.parity.logits import LogitFigures
from v4quant.parity.sentences import in_words
from v4quant.parity.verdict import MARGIN, Judgement, Verdict, blocks_of

_KINDS = {0: "window", CSA: "csa", HCA: "hca"}


def to_json(task: Task, comparison: Comparison, gates: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything, in plain values.

    Args:
        gates: the user's own, as `check_gates` gives them.
    """
    outcome, judgement = comparison.outcome, comparison.judgement
    assert outcome.logits is not None, "a comparison that came to its end"
    found = outcome.logits.found
    who = blame(outcome, judgement, comparison.attribution) if judgement.verdict is Verdict.DIFFERENT else None
    departing = judgement.departing_blocks(outcome)
    return {
        "tool_version": versions()["v4quant"],
        "verdict": str(judgement.verdict),
        "in_words": in_words(task, comparison, who),
        "departures": [asdict(departure) for departure in judgement.departures],
        "gates": gates,
        "kl_mean": found.kl.mean,
        "kl_max": found.kl.max,
        "top1": found.top1,
        "noise_floor": _noise_floor(comparison, judgement),
        "logits": _logits(found),
        "mtp_logits": _logits(outcome.mtp_logits.found) if outcome.mtp_logits else None,
        "layers": [
            _layer(number, layer, number < task.candidate.config.num_hash_layers, layer.name in departing, judgement)
            for number, layer in enumerate(outcome.layers)
        ],
        "conversations": conversations_json(task.prompts.conversations, found, outcome.logits.noise),
        "attribution": _attribution(comparison, who),
        "coverage": _coverage(comparison.coverage),
        **_sides(task),
        "evidence": _evidence(task, comparison),
    }


def check_gates(comparison: Comparison, max_kl: float | None, min_top1: float | None) -> list[dict[str, Any]]:
    """The user's own gates, each with what was found and whether it passed."""
    assert comparison.outcome.logits is not None
    found = comparison.outcome.logits.found
    gates: list[dict[str, Any]] = []
    if max_kl is not None:
        gates.append({"name": "--max-kl", "limit": max_kl, "found": found.kl.mean, "passed": found.kl.mean <= max_kl})
    if min_top1 is not None:
        gates.append({"name": "--min-top1", "limit": min_top1, "found": found.top1, "passed": found.top1 >= min_top1})
    return gates


def _noise_floor(comparison: Comparison, judgement: Judgement) -> dict[str, Any]:
    outcome = comparison.outcome
    assert outcome.logits is not None
    logits = outcome.logits.noise
    mtp = outcome.mtp_logits.noise if outcome.mtp_logits else {}
    return {
        "kl_mean": max(own.kl.mean for own in logits.values()),
        "kl_max": max(own.kl.max for own in logits.values()),
        "top1": min(own.top1 for own in logits.values()),
        "margin": MARGIN,
        "of": outcome.noise_of,
        "limits": judgement.limits,
        "variants": {
            name: {"logits": _logits(own), "mtp_logits": _logits(mtp[name]) if name in mtp else None}
            for name, own in logits.items()
        },
    }


def _logits(figures: LogitFigures) -> dict[str, Any]:
    return {
        "tokens": figures.tokens,
        "bit_equal": figures.bit_equal,
        "kl": asdict(figures.kl),
        "kl_reverse": asdict(figures.kl_reverse),
        "top1": figures.top1,
        "top5_overlap": figures.top5_overlap,
        "perplexity": {"reference": figures.perplexity_expected, "candidate": figures.perplexity_found},
        "kl_by_token": figures.kl_by_token,
    }


def _layer(number: int, layer: BlockOutcome, hashed: bool, departs: bool, judgement: Judgement) -> dict[str, Any]:
    isolated, accumulated = layer.isolated, layer.accumulated
    assert isolated is not None and accumulated is not None, "layers of the reference are always known"
    floor, limits = _worst_noise(layer), judgement.limits
    return {
        "layer": number,
        "kind": _KINDS[layer.ratio],
        "routing": "hash" if hashed else "score",
        "isolated_rel_err": isolated.streams.rel_err,
        "accumulated_rel_err": accumulated.streams.rel_err,
        "cosine": isolated.streams.cosine,
        "expert_agreement": isolated.routing.agreement,
        "indexer_overlap": isolated.indexer_overlap,
        "isolated": asdict(isolated.streams),
        "accumulated": asdict(accumulated.streams),
        "isolated_routing": asdict(isolated.routing),
        "accumulated_routing": asdict(accumulated.routing),
        "accumulated_indexer_overlap": accumulated.indexer_overlap,
        "floor": floor,
        "limit": {
            "isolated_rel_err": limits["isolated_rel_err"],
            "accumulated_rel_err": max(MARGIN * floor["accumulated_rel_err"], limits["isolated_rel_err"]),
        },
        "departs": departs,
    }


def _worst_noise(layer: BlockOutcome) -> dict[str, Any]:
    isolated = [own for own, _ in layer.noise.values()]
    overlaps = [own.indexer_overlap for own in isolated if own.indexer_overlap is not None]
    return {
        "isolated_rel_err": max(own.streams.rel_err for own in isolated),
        "accumulated_rel_err": max(own.streams.rel_err for _, own in layer.noise.values()),
        "expert_agreement": min(own.routing.agreement for own in isolated),
        "indexer_overlap": min(overlaps) if overlaps else None,
    }


def _attribution(comparison: Comparison, who: Blame | None) -> dict[str, Any] | None:
    if who is None:
        return None
    blocks = comparison.attribution
    compared = ", ".join(block.block for block in blocks)
    return {
        "layer": who.layer,
        "module": who.module,
        "blocks": [
            {
                "block": block.block,
                "error": block.error,
                "swapped": [asdict(exchange) for exchange in block.exchanges],
            }
            for block in blocks
        ],
        "tensors": [mismatch.to_json() for block in blocks for mismatch in block.tensors],
        "tensors_from": f"value comparison of {compared}" if blocks else "nothing: no weights of the reference",
    }


def _coverage(coverage: Coverage) -> dict[str, Any]:
    return {
        **asdict(coverage),
        "experts_seen": sum(layer.seen for layer in coverage.experts),
        "experts_in_all": sum(layer.of for layer in coverage.experts),
        "silent": coverage.silent,
    }


def _sides(task: Task) -> dict[str, Any]:
    reference = task.reference if isinstance(task.reference, Checkpoint) else None
    roles: dict[str, Mapping[str, int] | None] = {"reference": bytes_by_role(reference) if reference else None}
    return {
        "bytes_by_role": roles | {"candidate": bytes_by_role(task.candidate)},
        "config_differences": config_differences(task.candidate.config, reference.config) if reference else [],
    }


def _evidence(task: Task, comparison: Comparison) -> dict[str, Any]:
    stored = None if isinstance(task.reference, Checkpoint) else task.reference
    return {
        "reference": describe(task.reference) if isinstance(task.reference, Checkpoint) else None,
        "candidate": describe(task.candidate, "processes" if task.processes else "virtual"),
        "reference_outputs": {"path": str(stored.path), "sha256": stored.sha256(), **stored.metadata}
        if stored
        else None,
        "arithmetic": {"activations": str(task.activations), "products": str(task.arithmetic.products)},
        "index_topk": task.index_topk,
        "prompts": [prompt.tolist() for prompt in task.prompts.ids],
        "tokens_from": task.prompts.source,
        "chunks": _chunks(comparison),
        "versions": versions(),
        **machine(torch.device(task.device)),
        "seconds": comparison.seconds,
        "bytes_read": comparison.bytes_read,
        "layer_seconds": [block.seconds for block in blocks_of(comparison.outcome)],
        "layer_bytes_read": [block.bytes_read for block in blocks_of(comparison.outcome)],
    }


def _chunks(comparison: Comparison) -> list[list[int]]:
    """Tokens of each step, prompt by prompt."""
    lengths: list[list[int]] = [[] for _ in range(comparison.schedule.sequences)]
    for chunk in comparison.schedule.chunks:
        for run in chunk.runs:
            lengths[run.sequence].append(run.rows.stop - run.rows.start)
    return lengths
