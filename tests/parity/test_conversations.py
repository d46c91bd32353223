"""Figures of the assistant's tokens: those rows of the logits that foretell them, and no others."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.parity.test_logits import compared, random_logits
from v4quant.config import V4Config
from v4quant.errors import UsageError
from v4quant.model.streaming import Schedule
from v4quant.parity.conversations import Conversation, Opening, Said, SpanFigures, conversations_json, rows_of
from v4quant.parity.logits import LogitFigures
from v4quant.parity.prompts import Prompts
from v4quant.testing.releases import synth_config

CONFIG = V4Config.from_json(synth_config("flash", tiny=True)[0], "synth")


def conversation(name: str, tokens: int, **stretches: Any) -> Conversation:
    values: dict[str, Any] = {"assistant": (), "tool_calls": (), "opening": None} | stretches
    return Conversation(name, tuple(range(tokens)), **values)


def kl_by_hand(found: torch.Tensor, expected: torch.Tensor) -> list[float]:
    ours, theirs = found.double().log_softmax(-1), expected.double().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1).tolist()


def test_rows_foretell() -> None:
    assert rows_of([(1, 3), (5, 6)]) == [0, 1, 4]
    assert rows_of([(2, 4)], first=10) == [11, 12]
    assert rows_of([]) == []


def test_figures_of_some_rows() -> None:
    found, expected = random_logits(1), random_logits(2)
    found[3] = expected[3]
    rows = [1, 3, 8]
    kl = kl_by_hand(found, expected)
    own = SpanFigures.of(compared(found, expected), rows)
    assert own is not None and own.tokens == 3
    assert own.kl_mean == pytest.approx(sum(kl[row] for row in rows) / 3, rel=1e-5)
    assert own.kl_max == pytest.approx(max(kl[row] for row in rows), rel=1e-5)
    same = (found.argmax(-1) == expected.argmax(-1)).tolist()
    assert same[3] and not all(same[row] for row in rows)
    assert own.top1 == pytest.approx(sum(same[row] for row in rows) / 3)
    assert SpanFigures.of(compared(found, expected), []) is None


def figures(kl: list[float], same: list[bool]) -> LogitFigures:
    """Figures by token; the others do not matter here."""
    return replace(compared(random_logits(1), random_logits(2)), kl_by_token=kl, top1_by_token=same)


def test_each_conversation_has_its_own_rows() -> None:
    """A difference at one token shows where that token is foretold: not a row later, nor in another conversation."""
    talks = [
        conversation("line 1", 5, assistant=((2, 4),)),
        conversation("line 2", 6, assistant=((1, 5),), tool_calls=((3, 5),)),
        conversation("line 4", 2),
    ]
    kl, same = [0.0] * 13, [True] * 13
    kl[5 + 2], same[5 + 2] = 0.5, False  # foretells token 3 of line 2
    noise = {"one": figures([1e-3] * 13, [True] * 13), "two": figures([2e-3] * 13, [False] + [True] * 12)}
    found = conversations_json(talks, figures(kl, same), noise)
    assert found is not None
    assert [own["name"] for own in found["each"]] == ["line 1", "line 2", "line 4"]
    assert [own["tokens"] for own in found["each"]] == [5, 6, 2]
    first, second, third = found["each"]
    assert first["assistant"] == {"tokens": 2, "kl_mean": 0.0, "kl_max": 0.0, "top1": 1.0}
    assert second["assistant"] == {"tokens": 4, "kl_mean": 0.125, "kl_max": 0.5, "top1": 0.75}
    assert second["tool_calls"] == {"tokens": 2, "kl_mean": 0.25, "kl_max": 0.5, "top1": 0.5}
    assert (first["tool_calls"], third["assistant"], third["tool_calls"]) == (None, None, None)
    assert found["tool_calls"] == second["tool_calls"] | {"noise": {"kl_mean": 2e-3, "kl_max": 2e-3, "top1": 1.0}}
    assert (found["assistant"]["tokens"], found["assistant"]["kl_mean"]) == (6, pytest.approx(0.5 / 6))
    assert found["continuations"] is None
    kl[5 + 2], kl[5 + 4], kl[0], kl[4] = 0.0, 9.0, 9.0, 9.0  # foretell what the assistant did not say
    found = conversations_json(talks, figures(kl, same), noise)
    assert found is not None and found["assistant"]["kl_max"] == 0.0


def test_no_conversations() -> None:
    assert conversations_json([], figures([0.0], [True]), {}) is None


def test_rows_are_those_of_the_schedule() -> None:
    """Prompt behind prompt, as the run has its tokens."""
    talks = [conversation("a", 5), conversation("b", 3)]
    prompts = Prompts.of_conversations(talks, None, CONFIG, "file")
    assert prompts.conversations == tuple(talks)
    ids = Schedule.of(prompts.ids, prompts.sizes).input_ids
    assert ids.tolist() == [*range(5), *range(3)]


def test_openings_are_checked_before_the_run() -> None:
    opening = Opening((3, 512), lambda ids: Said(str(ids), (), ""))
    with pytest.raises(UsageError, match="file: line 7, to be answered: token 1 is 512, expected 0 to 511"):
        Prompts.of_conversations([conversation("line 7", 4, opening=opening)], None, CONFIG, "file")
    with pytest.raises(UsageError, match="file: holds no prompt"):
        Prompts.of_conversations([], None, CONFIG, "file")
