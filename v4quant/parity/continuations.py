"""Greedy answers of both models to the same conversations: where they part, and whether they call the same tools.

Each model is whole in memory, the candidate first and then the reference, so that either has to fit, not both. Greedy
texts part sooner or later over noise alone. How much the reference preferred its own token where they part tells chance
from change: a few hundredths of a nat are a coin's toss.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from v4quant.checkpoint.reader import Checkpoint
from v4quant.errors import CheckFailedError
from v4quant.model.generation import generate
from v4quant.model.resident import describe, free_bytes, needs_of
from v4quant.model.sampling import Sampling
from v4quant.model.transformer import Transformer
from v4quant.parity.compare import Task
from v4quant.parity.conversations import Call, Opening, Said
from v4quant.words import decimal_bytes

# How an answer ends.
STOP, LENGTH, BROKEN = "stop", "length", "no numbers"
# What the tool calls of two answers are to each other.
SAME, DIFFERENT, NO_CALLS, UNKNOWN = "same", "different", "none", "unknown"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Continued:
    """What a model wrote.

    Attributes:
        ids: token ids.
        finish: "stop" at the end of the sentence, "length" at the limit, "no numbers" where its logits were NaN.
    """

    ids: list[int]
    finish: str


@dataclass(frozen=True)
class Continuation:
    """What both wrote.

    Attributes:
        candidate, reference: of each.
        parts_at: the first token that differs, counted from 0; None where all are alike.
        margin: the reference's logit of its own token there, less that of the candidate's token: by how many nats it
            preferred its own; None where all are alike, or one ended.
    """

    candidate: Continued
    reference: Continued
    parts_at: int | None
    margin: float | None


def reason_to_skip(task: Task, max_tokens: int) -> str:
    """Why greedy answers are not written; "" if nothing stands against it."""
    for side, checkpoint in (("reference", task.reference), ("candidate", task.candidate)):
        if not isinstance(checkpoint, Checkpoint):
            return f"the {side} is no whole checkpoint, which writing answers takes"
        tokens = max(len(own.opening.ids) for own in task.prompts.conversations if own.opening) + max_tokens
        needs, free = needs_of(checkpoint, task.arithmetic, tokens), free_bytes(torch.device(task.device))
        if free is not None and needs.total > free:
            return (
                f"the {side} takes {describe(needs)} in memory, {decimal_bytes(free)} is free, and streamed from disk "
                "each token is a pass over all layers"
            )
    return ""


def continue_all(
    task: Task, max_tokens: int, stop: int, progress: Progress = lambda _: None
) -> dict[str, Continuation]:
    """Let both models answer every conversation that has something to answer.

    Args:
        task: two whole checkpoints that fit into memory.
        max_tokens: of each answer at most.
        stop: id of the token that ends a sentence.
        progress: called once for each answer of each model.

    Returns:
        By the conversation's name.

    Raises:
        CheckpointError: if weights are missing or damaged.
    """
    assert isinstance(task.candidate, Checkpoint) and isinstance(task.reference, Checkpoint), "reason_to_skip says so"
    openings = {own.name: own.opening for own in task.prompts.conversations if own.opening is not None}
    model = _model(task, task.candidate)
    candidates = {}
    for name, opening in openings.items():
        candidates[name], _ = _write(model, opening, max_tokens, stop)
        progress(f"candidate, {name}")
    del model  # before the other one takes its place
    model = _model(task, task.reference)
    found = {}
    for name, opening in openings.items():
        reference, margin = _write(model, opening, max_tokens, stop, candidates[name].ids)
        found[name] = Continuation(candidates[name], reference, _parting(candidates[name], reference), margin)
        progress(f"reference, {name}")
    return found


def _model(task: Task, checkpoint: Checkpoint) -> Transformer:
    return Transformer(checkpoint, task.arithmetic, task.device, config=task.config_of(checkpoint))


def _write(
    model: Transformer, opening: Opening, max_tokens: int, stop: int, other: Sequence[int] = ()
) -> tuple[Continued, float | None]:
    """An answer; and by how much the model preferred its own token where it first leaves another answer."""
    ids: list[int] = []
    margin = None
    try:
        for step in generate(model, torch.tensor(opening.ids), Sampling(), max_tokens, stop):
            if margin is None and len(ids) < len(other) and step.token != other[len(ids)]:
                margin = float(step.logits[step.token].double() - step.logits[other[len(ids)]].double())
            ids.append(step.token)
    except CheckFailedError:  # NaN or infinity: the verdict says so, and what came before counts
        return Continued(ids, BROKEN), margin
    return Continued(ids, STOP if ids[-1] == stop else LENGTH), margin


def _parting(one: Continued, other: Continued) -> int | None:
    """Where two answers part."""
    pairs = zip(one.ids, other.ids, strict=False)
    first = next((place for place, (mine, yours) in enumerate(pairs) if mine != yours), None)
    if first is None and len(one.ids) != len(other.ids):
        return min(len(one.ids), len(other.ids))
    return first


def skipped_json(reason: str, max_tokens: int) -> dict[str, Any]:
    """What the result says where no answers were written."""
    return {"max_tokens": max_tokens, "skipped": reason, "written": 0, "alike": 0, "calls": {}, "each": []}


def continuations_json(task: Task, found: dict[str, Continuation], max_tokens: int) -> dict[str, Any]:
    """All answers, in plain values."""
    each = [
        _json(own.name, found[own.name], own.opening) for own in task.prompts.conversations if own.opening is not None
    ]
    verdicts = Counter(own["calls"] for own in each)
    return {
        "max_tokens": max_tokens,
        "skipped": None,
        "written": len(each),
        "alike": sum(own["parts_at"] is None for own in each),
        "calls": {verdict: verdicts[verdict] for verdict in (SAME, DIFFERENT, NO_CALLS, UNKNOWN)},
        "each": each,
    }


def _json(name: str, found: Continuation, opening: Opening) -> dict[str, Any]:
    sides = {"reference": found.reference, "candidate": found.candidate}
    said = {side: opening.read(own.ids) for side, own in sides.items()}
    return {
        "name": name,
        "parts_at": found.parts_at,
        "margin": found.margin,
        "calls": _judge_calls(*((sides[side], said[side]) for side in sides)),
        **{
            side: {
                "tokens": len(own.ids),
                "finish": own.finish,
                "text": said[side].text,
                "calls": None if said[side].calls is None else [asdict(call) for call in said[side].calls or ()],
                "problem": said[side].problem or None,
            }
            for side, own in sides.items()
        },
    }


def _judge_calls(one: tuple[Continued, Said], other: tuple[Continued, Said]) -> str:
    """Whether two answers call the same tools with the same arguments; "unknown" where the limit cut one short."""
    calls = [None if said.calls is None else [_canonical(call) for call in said.calls] for _, said in (one, other)]
    if None not in calls:
        return DIFFERENT if calls[0] != calls[1] else SAME if calls[0] else NO_CALLS
    cut = any(said.calls is None and own.finish == LENGTH for own, said in (one, other))
    return UNKNOWN if cut or calls == [None, None] else DIFFERENT


def _canonical(call: Call) -> tuple[str, str]:
    """A call as its tool sees it: the order of keys and the spelling of strings do not matter."""
    try:
        return call.name, json.dumps(json.loads(call.arguments), sort_keys=True)
    except (ValueError, RecursionError):  # integers of thousands of digits, nesting beyond Python's
        return call.name, call.arguments
