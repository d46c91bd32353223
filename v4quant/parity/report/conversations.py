"""Conversations on the page: what the assistant said and called, teacher-forced and in greedy answers."""

from collections.abc import Mapping
from typing import Any

from v4quant.parity.report.figures import NOT_APPLICABLE, number, share
from v4quant.parity.report.markup import Column, Html, section, table, tag
from v4quant.words import plural

_SIDES = ("reference", "candidate")
_CALLS = {
    "same": "✓ the same",
    "different": "✗ different",
    "none": "none",
    "unknown": "not known",
}


def conversations_part(result: Mapping[str, Any]) -> Html:
    """Figures of the assistant's tokens and of its tool calls, answers of both; nothing without conversations."""
    found = result["conversations"]
    if found is None:
        return Html()
    lead = (
        "Both models read each conversation as it stands; compared are the distributions that the assistant's tokens "
        "come from. These figures are parts of the logits' above, and the verdict rests on those."
    )
    return section(
        "conversations", "Conversations", tag("p", lead), _together(found), _each(found["each"]), *_answers(found)
    )


def _together(found: Mapping[str, Any]) -> Html:
    columns = [Column("tokens of"), Column("tokens", numeric=True)]
    for title in ("KL mean", "KL max", "top-1"):
        columns += [Column("found", numeric=True, group=title), Column("floor", numeric=True, group=title)]
    rows: list[list[object]] = []
    for key, name in (("assistant", "assistant"), ("tool_calls", "tool calls")):
        own = found[key]
        if own is None:
            rows.append([name, "0", *[NOT_APPLICABLE] * 6])
            continue
        noise = own["noise"]
        kl = [number(side[figure]) for figure in ("kl_mean", "kl_max") for side in (own, noise)]
        rows.append([name, f"{own['tokens']:,}", *kl, share(own["top1"]), share(noise["top1"])])
    return table("All conversations", columns, rows)


def _each(conversations: list[Mapping[str, Any]]) -> Html:
    columns = [Column("conversation"), Column("tokens", numeric=True)]
    for group in ("assistant", "tool calls"):
        columns += (Column(title, numeric=True, group=group) for title in ("tokens", "KL mean", "KL max", "top-1"))
    rows = [
        [own["name"], f"{own['tokens']:,}", *_figures(own["assistant"]), *_figures(own["tool_calls"])]
        for own in conversations
    ]
    return table("Each conversation", columns, rows)


def _figures(own: Mapping[str, Any] | None) -> list[str]:
    if own is None:
        return ["0", *[NOT_APPLICABLE] * 3]
    return [f"{own['tokens']:,}", number(own["kl_mean"]), number(own["kl_max"]), share(own["top1"])]


def _answers(found: Mapping[str, Any]) -> list[Html]:
    answers = found["continuations"]
    if answers["skipped"] is not None:
        return [tag("p", f"Greedy answers were not written: {answers['skipped']}.")]
    columns = [
        Column("conversation"),
        Column("part at token", numeric=True),
        Column("margin, nats", numeric=True),
        Column("tool calls"),
        *(Column(f"tokens, {side}", numeric=True) for side in _SIDES),
    ]
    rows = [
        [
            own["name"],
            "never" if own["parts_at"] is None else f"{own['parts_at']:,}",
            number(own["margin"]),
            _CALLS.get(own["calls"], own["calls"]),
            *(f"{own[side]['tokens']:,} ({own[side]['finish']})" for side in _SIDES),
        ]
        for own in answers["each"]
    ]
    marked = [place for place, own in enumerate(answers["each"]) if own["calls"] == "different"]
    note = (
        f"Up to {plural(answers['max_tokens'], 'token')} each, always the best one. Margin: by how much the reference "
        "preferred its own token where the two part; near 0 they part by chance. Tool calls are not known where the "
        "limit cut an answer."
    )
    texts = [_texts(own) for own in answers["each"]]
    whole = tag("details", tag("summary", f"What was written: {plural(len(texts), 'answer')}"), *texts)
    return [table("Greedy answers", columns, rows, marked), tag("p", note, class_="note"), whole]


def _texts(own: Mapping[str, Any]) -> Html:
    """What both wrote; once where it is the same."""
    if own["parts_at"] is None:
        return tag("div", tag("p", tag("strong", own["name"])), *_text("both", own["reference"]))
    sides = [part for side in _SIDES for part in _text(side, own[side])]
    return tag("div", tag("p", tag("strong", own["name"])), *sides)


def _text(who: str, said: Mapping[str, Any]) -> list[Html]:
    """An answer, the calls in it, or why it is not well formed."""
    parts = [tag("p", f"{who}: ", tag("code", said["text"]))]
    parts += (tag("p", "calls ", tag("code", call["name"], " ", call["arguments"])) for call in said["calls"] or ())
    return [*parts, tag("p", said["problem"])] if said["problem"] else parts
