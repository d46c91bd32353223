"""Greedy answers of two models: where they part and by how much, which tools they call, when none are written."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.references import named
from tests.parity.runs import edited
from v4quant.checkpoint.reader import Checkpoint, open_checkpoint
from v4quant.model.generation import generate
from v4quant.model.sampling import Sampling
from v4quant.model.transformer import Transformer
from v4quant.parity import continuations
from v4quant.parity.compare import Task
from v4quant.parity.continuations import (
    Continuation,
    Continued,
    continuations_json,
    continue_all,
    reason_to_skip,
)
from v4quant.parity.conversations import Call, Conversation, Opening, Said
from v4quant.parity.prompts import Prompts
from v4quant.parity.stored import StoredOutputs

FLASH = named("tiny-flash")
NONE = -1  # no token ends an answer


def said(text: str, *calls: tuple[str, str], problem: str = "") -> Said:
    return Said(text, None if problem else tuple(Call(*call) for call in calls), problem)


def talks(*openings: Sequence[int], read: Callable[[Sequence[int]], Said] = lambda ids: said(str(ids))) -> Prompts:
    """Conversations to be answered after these tokens, and one without anything to answer."""
    ids = tuple(FLASH.ids[:40].tolist())
    made = [Conversation(f"line {n}", ids, (), (), Opening(tuple(own), read)) for n, own in enumerate(openings, 1)]
    config = open_checkpoint(FLASH.folder).config
    return Prompts.of_conversations([*made, Conversation("none", ids, (), (), None)], None, config, "test")


OPENINGS = talks(FLASH.ids[:50].tolist(), FLASH.ids[60:70].tolist(), [7])


def task_of(candidate: Path, prompts: Prompts = OPENINGS) -> Task:
    return Task(open_checkpoint(candidate), open_checkpoint(FLASH.folder), prompts)


@pytest.fixture(scope="module")
def louder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A norm at the end that is twice as loud in a few dims: another model, but not by much."""
    return edited(FLASH.folder, tmp_path_factory.mktemp("louder") / "out", "norm.weight", lambda gain: gain[:3].mul_(3))


def test_a_model_and_itself() -> None:
    done: list[str] = []
    found = continue_all(task_of(FLASH.folder), 5, NONE, done.append)
    assert list(found) == ["line 1", "line 2", "line 3"]
    assert all((own.parts_at, own.margin) == (None, None) for own in found.values())
    assert all(own.candidate == own.reference and len(own.reference.ids) == 5 for own in found.values())
    assert done == [f"{side}, line {number}" for side in ("candidate", "reference") for number in (1, 2, 3)]


def test_where_they_part_and_by_how_much(louder: Path) -> None:
    found = continue_all(task_of(louder), 8, NONE)
    models = [Transformer(open_checkpoint(folder)) for folder in (louder, FLASH.folder)]
    parted = 0
    for talk in OPENINGS.conversations[:3]:
        assert talk.opening is not None
        ids = torch.tensor(talk.opening.ids)
        ours, theirs = (list(generate(model, ids, Sampling(), 8, NONE)) for model in models)
        own = found[talk.name]
        assert own.candidate == Continued([step.token for step in ours], "length")
        assert own.reference == Continued([step.token for step in theirs], "length")
        places = [place for place in range(8) if ours[place].token != theirs[place].token]
        assert own.parts_at == (places[0] if places else None)
        if own.parts_at is not None:
            parted += 1
            logits = theirs[own.parts_at].logits
            margin = float(logits.max() - logits[ours[own.parts_at].token])
            assert own.margin == pytest.approx(margin, rel=1e-5) and margin > 0
    assert parted, "the two models differ"


def test_one_ends_before_the_other(louder: Path) -> None:
    plain = continue_all(task_of(louder), 8, NONE)
    name, own = next((name, own) for name, own in plain.items() if own.parts_at is not None)
    assert own.parts_at is not None
    stop = own.reference.ids[own.parts_at]
    assert stop not in own.reference.ids[: own.parts_at]
    found = continue_all(task_of(louder), 8, stop)[name]
    assert found.reference == Continued(own.reference.ids[: own.parts_at + 1], "stop")
    assert (found.parts_at, found.margin) == (own.parts_at, own.margin)
    assert len(found.candidate.ids) > len(found.reference.ids)


def test_a_candidate_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, calls = Transformer.logits, []

    def broken(model: Transformer, streams: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return logits(model, streams) * (torch.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(Transformer, "logits", broken)
    found = continue_all(task_of(FLASH.folder, talks([7])), 4, NONE)["line 1"]
    assert (len(found.candidate.ids), found.candidate.finish) == (2, "no numbers")
    assert (len(found.reference.ids), found.parts_at, found.margin) == (4, 2, None)


def test_one_model_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[weakref.ref[Transformer]] = []

    class Watched(Transformer):
        def __init__(self, *args: Any, **options: Any) -> None:
            assert [own() for own in built] == [None] * len(built)
            super().__init__(*args, **options)
            built.append(weakref.ref(self))

    monkeypatch.setattr(continuations, "Transformer", Watched)
    continue_all(task_of(FLASH.folder, talks([7])), 2, NONE)
    assert len(built) == 2


@pytest.mark.parametrize(
    ("reference", "candidate", "finishes", "verdict"),
    [
        (said("a"), said("b"), ("stop", "stop"), "none"),
        (said("", ("f", '{"a": 1, "b": "x"}')), said("", ("f", '{"b": "\\u0078", "a": 1}')), ("stop", "stop"), "same"),
        (said("", ("f", '{"a": 1}')), said("", ("f", '{"a": true}')), ("stop", "stop"), "different"),
        (said("", ("f", "{}")), said("", ("g", "{}")), ("stop", "stop"), "different"),
        (said("", ("f", "{}")), said(""), ("stop", "stop"), "different"),
        (said("", ("f", "{}"), ("g", "{}")), said("", ("g", "{}"), ("f", "{}")), ("stop", "stop"), "different"),
        (said("", ("f", "{}")), said("", problem="cut"), ("stop", "length"), "unknown"),
        (said("", ("f", "{}")), said("", problem="broken"), ("length", "stop"), "different"),
        (said("", problem="cut"), said("", problem="cut"), ("length", "length"), "unknown"),
        (said("", problem="broken"), said("", problem="broken"), ("stop", "stop"), "unknown"),
        (said("", ("f", f"[{'9' * 5000}]")), said("", ("f", f"[{'9' * 5000}]")), ("stop", "stop"), "same"),
    ],
)
def test_tool_calls(reference: Said, candidate: Said, finishes: tuple[str, str], verdict: str) -> None:
    texts = {1: reference, 2: candidate}
    prompts = talks([7], read=lambda ids: texts[ids[0]])
    pair = Continuation(Continued([2], finishes[1]), Continued([1], finishes[0]), 0, 0.5)
    found = continuations_json(task_of(FLASH.folder, prompts), {"line 1": pair}, 9)
    assert found["calls"] == {name: int(name == verdict) for name in ("same", "different", "none", "unknown")}
    assert (found["max_tokens"], found["skipped"], found["written"], found["alike"]) == (9, None, 1, 0)
    (own,) = found["each"]
    assert (own["name"], own["parts_at"], own["margin"], own["calls"]) == ("line 1", 0, 0.5, verdict)
    for side, text, finish in (("reference", reference, finishes[0]), ("candidate", candidate, finishes[1])):
        assert (own[side]["tokens"], own[side]["finish"], own[side]["text"]) == (1, finish, text.text)
        assert own[side]["problem"] == (text.problem or None)
        calls = text.calls and [{"name": call.name, "arguments": call.arguments} for call in text.calls]
        assert own[side]["calls"] == (calls if calls is None else list(calls))


def test_what_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(FLASH.folder)
    assert reason_to_skip(task, 8) == ""
    monkeypatch.setattr(continuations, "free_bytes", lambda _: None)
    assert reason_to_skip(task, 8) == ""
    monkeypatch.setattr(continuations, "free_bytes", lambda _: 10**6)
    reason = reason_to_skip(task, 8)
    assert reason.startswith("the reference takes ") and "1.00 MB is free" in reason
    assert "each token is a pass over all layers" in reason
    assert isinstance(task.candidate, Checkpoint)
    stored = StoredOutputs(FLASH.outputs, task.candidate.config)
    assert "the reference is no whole checkpoint" in reason_to_skip(Task(task.candidate, stored, OPENINGS), 8)
