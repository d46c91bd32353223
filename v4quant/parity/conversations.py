"""Conversations as prompts: how far two models are apart on what the assistant says in them, and on its tool calls.

Teacher-forced: both models read the conversation as it stands, and are compared on the next-token distributions that
its assistant's tokens were drawn from. The logits behind token i say what comes at i + 1, so tokens [start, stop) are
foretold by rows [start - 1, stop - 1).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from v4quant.parity.logits import LogitFigures

Stretch = tuple[int, int]
"""Tokens of a conversation, [start, stop); start is not 0: nothing foretells the first token."""


@dataclass(frozen=True)
class Call:
    """A tool call: name of the function, and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Said:
    """An answer, read.

    Attributes:
        text: what was written.
        calls: tool calls in it; None where it is not well formed.
        problem: why it is not; "" where it is.
    """

    text: str
    calls: tuple[Call, ...] | None
    problem: str


@dataclass(frozen=True)
class Opening:
    """A conversation up to its last answer, which is to be written anew.

    Attributes:
        ids: its tokens, the header of the answer included.
        read: what the token ids of an answer say.
    """

    ids: tuple[int, ...]
    read: Callable[[Sequence[int]], Said]


@dataclass(frozen=True)
class Conversation:
    """An encoded conversation.

    Attributes:
        name: for people, "line 3".
        ids: its tokens.
        assistant: what the assistant wrote: reasoning, content, calls, the end of each sentence.
        tool_calls: the calls among it.
        opening: what is to be answered; None where there is nothing.
    """

    name: str
    ids: tuple[int, ...]
    assistant: tuple[Stretch, ...]
    tool_calls: tuple[Stretch, ...]
    opening: Opening | None


@dataclass(frozen=True)
class SpanFigures:
    """Logits against those expected, on some tokens.

    Attributes:
        tokens: how many.
        kl_mean, kl_max: KL(expected || found), in nats.
        top1: share with the same best token.
    """

    tokens: int
    kl_mean: float
    kl_max: float
    top1: float

    @classmethod
    def of(cls, figures: LogitFigures, rows: Sequence[int]) -> "SpanFigures | None":
        """Of some rows of all tokens; None for none."""
        if not rows:
            return None
        kl = [figures.kl_by_token[row] for row in rows]
        same = [figures.top1_by_token[row] for row in rows]
        return cls(len(rows), sum(kl) / len(kl), max(kl), sum(same) / len(same))


def rows_of(stretches: Sequence[Stretch], first: int = 0) -> list[int]:
    """Rows of logits that foretell the tokens of stretches, in a conversation whose first row is `first`."""
    return [first + token - 1 for start, stop in stretches for token in range(start, stop)]


def conversations_json(
    conversations: Sequence[Conversation], found: LogitFigures, noise: Mapping[str, LogitFigures]
) -> dict[str, Any] | None:
    """Figures of every conversation and of all together, in plain values; None where there are no conversations.

    Args:
        conversations: all prompts of the run, in order.
        found: the candidate against the reference.
        noise: of each variant.
    """
    if not conversations:
        return None
    first, each = 0, []
    rows: dict[str, list[int]] = {"assistant": [], "tool_calls": []}
    for conversation in conversations:
        own = {name: rows_of(getattr(conversation, name), first) for name in rows}
        for name, some in own.items():
            rows[name] += some
        figures = {name: _json(SpanFigures.of(found, some)) for name, some in own.items()}
        each.append({"name": conversation.name, "tokens": len(conversation.ids), **figures})
        first += len(conversation.ids)
    together = {name: _with_noise(found, noise, some) for name, some in rows.items()}
    return {**together, "each": each, "continuations": None}


def _json(figures: SpanFigures | None) -> dict[str, Any] | None:
    return None if figures is None else asdict(figures)


def _with_noise(found: LogitFigures, noise: Mapping[str, LogitFigures], rows: Sequence[int]) -> dict[str, Any] | None:
    """Figures of some rows, beside the largest of the noise on the same rows."""
    figures = SpanFigures.of(found, rows)
    if figures is None:
        return None
    variants = [own for figure in noise.values() if (own := SpanFigures.of(figure, rows)) is not None]
    floor = {
        "kl_mean": max(own.kl_mean for own in variants),
        "kl_max": max(own.kl_max for own in variants),
        "top1": min(own.top1 for own in variants),
    }
    return {**asdict(figures), "noise": floor}
