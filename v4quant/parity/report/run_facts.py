"""Tables of what was run: coverage, configs, the user's own gates, and the evidence to run it again."""

from collections.abc import Mapping
from typing import Any

from v4quant.parity.report.figures import NOT_APPLICABLE, duration, number, run_lengths, share
from v4quant.parity.report.markup import Column, Html, join, pairs, section, table, tag
from v4quant.parity.sentences import describe_ranks
from v4quant.words import decimal_bytes, plural

_SIDES = ("reference", "candidate")
_SHOWN_CHUNKS = 20


def coverage_part(result: Mapping[str, Any]) -> Html:
    """Which paths of the model ran, how often, and what it takes for those that never did."""
    coverage = result["coverage"]
    run = ", ".join(
        [
            f"{plural(coverage['tokens'], 'token')} in {plural(coverage['prompts'], 'prompt')}",
            plural(coverage["decode_steps"], "decode step"),
        ]
    )
    parts: list[Html] = [tag("p", f"{run}.")]
    if coverage["silent"]:
        warning = "Never exercised: " + ", ".join(coverage["silent"]) + ". Silence is no proof."
        parts.append(tag("p", warning, class_="warning"))
    parts += [_paths(coverage["paths"]), *_experts(coverage), _executed(coverage["executed"])]
    return section("coverage", "Coverage", *parts)


def _paths(paths: list[Mapping[str, Any]]) -> Html:
    columns = [
        Column("path"),
        Column("exercised", numeric=True),
        Column("of", numeric=True),
        Column("share", numeric=True),
        Column("what it needs", kind="prose"),
    ]
    rows = [
        (
            of["path"],
            f"{of['fired']:,}" if of["fired"] else tag("strong", "never"),
            f"{of['of']:,} {of['unit']}",
            share(of["fired"] / of["of"]) if of["of"] else NOT_APPLICABLE,
            of["needs"],
        )
        for of in paths
    ]
    return table("Paths of the model", columns, rows, [place for place, of in enumerate(paths) if not of["fired"]])


def _experts(coverage: Mapping[str, Any]) -> list[Html]:
    """How many experts ran, and the layers where some did not."""
    layers = coverage["experts"]
    total = sum(layer["of"] for layer in layers)
    missing = [layer for layer in layers if layer["seen"] < layer["of"]]
    seen = f"{coverage['experts_seen']:,} of {plural(total, 'routed expert')} ran."
    if not missing:
        return [tag("p", seen)]
    columns = [Column("layer"), Column("ran", numeric=True), Column("of", numeric=True), Column("never", numeric=True)]
    rows = [
        (layer["layer"], f"{layer['seen']:,}", f"{layer['of']:,}", f"{layer['of'] - layer['seen']:,}")
        for layer in missing
    ]
    rest = len(layers) - len(missing)
    said = f"{seen} {plural(rest, 'layer')} ran all of theirs." if rest else seen
    return [tag("p", said), table("Layers with experts that never ran", columns, rows)]


def _executed(executed: list[Mapping[str, Any]]) -> Html:
    columns = [
        Column("what"),
        Column("counted", numeric=True),
        Column("expected", numeric=True),
        Column("agree"),
    ]
    wrong = [place for place, of in enumerate(executed) if of["counted"] != of["expected"]]
    rows = [
        (of["what"], f"{of['counted']:,}", f"{of['expected']:,}", "✗ no" if place in wrong else "✓ yes")
        for place, of in enumerate(executed)
    ]
    return table("What was executed, counted while it ran", columns, rows, wrong)


def config_part(result: Mapping[str, Any]) -> Html:
    """Keys that the two configs do not share."""
    found = result["config_differences"]
    if not found:
        return section("config", "Config differences", tag("p", "None: both configs say the same."))
    columns = [Column("key"), Column("reference"), Column("candidate")]
    rows = [[tag("code", of["key"]), *(tag("code", of[side]) for side in _SIDES)] for of in found]
    return section("config", "Config differences", table("Keys that differ", columns, rows))


def gates_part(result: Mapping[str, Any]) -> Html:
    """The limits that the user set."""
    gates = result["gates"]
    if not gates:
        return section("gates", "Own gates", tag("p", "None were set."))
    columns = [Column("gate"), Column("limit", numeric=True), Column("found", numeric=True), Column("passed")]
    rows = [
        (
            tag("code", gate["name"]),
            f"{gate['limit']:g}",
            number(gate["found"]),
            "✓ yes" if gate["passed"] else "✗ no",
        )
        for gate in gates
    ]
    failed = [place for place, gate in enumerate(gates) if not gate["passed"]]
    return section("gates", "Own gates", table("Limits set for this run", columns, rows, failed))


def evidence_part(result: Mapping[str, Any]) -> Html:
    """Everything needed to know what was compared, and to run it again."""
    evidence = result["evidence"]
    return section("evidence", "Evidence", _checkpoints(evidence), pairs(_run(evidence)), *_details(evidence))


def _checkpoints(evidence: Mapping[str, Any]) -> Html:
    sides = [side for side in _SIDES if evidence[side] is not None]  # a stored reference is no checkpoint
    columns = [Column(""), *(Column(side, kind="name") for side in sides)]
    keys = {
        "path": "path",
        "release": "release",
        "format": "format",
        "source_id": "source id",
        "index_sha256": "index, SHA-256",
        "config_sha256": "config, SHA-256",
        "certificate_sha256": "certificate, SHA-256",
    }
    rows = [
        [
            title,
            *(tag("code", NOT_APPLICABLE if evidence[side][key] is None else evidence[side][key]) for side in sides),
        ]
        for key, title in keys.items()
    ]
    sizes = [f"{evidence[side]['bytes']:,} ({decimal_bytes(evidence[side]['bytes'])})" for side in sides]
    ranks = [evidence[side]["ranks"] for side in sides]
    run_by = [describe_ranks(own) if own else NOT_APPLICABLE for own in ranks]
    return table("Checkpoints", columns, [*rows, ["bytes", *sizes], *([["run by", *run_by]] if any(ranks) else [])])


def _run(evidence: Mapping[str, Any]) -> list[tuple[str, object]]:
    arithmetic, outputs = evidence["arithmetic"], evidence["reference_outputs"]
    facts: list[tuple[str, object]] = [
        ("arithmetic", f"activations {arithmetic['activations']}, products {arithmetic['products']}"),
        ("device", f"{evidence['device']}, {plural(evidence['threads'], 'thread')}"),
        ("processor", evidence["cpu"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in evidence["versions"].items())),
        ("tokens from", evidence["tokens_from"]),
        ("time", f"{duration(evidence['seconds'])}, of it layers {duration(sum(evidence['layer_seconds']))}"),
        ("read", decimal_bytes(evidence["bytes_read"])),
        ("peak memory", decimal_bytes(evidence["peak_memory_bytes"])),
    ]
    if outputs is not None:
        facts.insert(
            0, ("reference outputs", join([tag("code", outputs["path"]), " ", tag("code", outputs["sha256"])]))
        )
    return facts


def _details(evidence: Mapping[str, Any]) -> list[Html]:
    """Prompts and chunks: closed, for they are long."""
    chunks = [run_lengths(prompt) for prompt in evidence["chunks"]]
    shown = [tag("li", f"prompt {place}: {of}") for place, of in enumerate(chunks[:_SHOWN_CHUNKS], 1)]
    if len(chunks) > _SHOWN_CHUNKS:
        shown.append(tag("li", f"and {plural(len(chunks) - _SHOWN_CHUNKS, 'more prompt')}, in parity.json"))
    prompts = evidence["prompts"]
    ids = [tag("p", f"prompt {place}: ", tag("code", " ".join(map(str, of)))) for place, of in enumerate(prompts, 1)]
    total = sum(map(len, prompts))
    return [
        tag("p", "Chunks, in tokens (× for steps of one size):"),
        tag("ul", *shown),
        tag("details", tag("summary", f"Token ids: {total:,} in {plural(len(prompts), 'prompt')}"), *ids),
    ]
