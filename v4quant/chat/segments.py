"""A prompt in segments: control tokens, and text that must never become one.

Text of users, tools and models may spell a control token. In one string the two cannot be told apart; segments keep
them apart until they are token ids (tokenizer.py).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from v4quant.chat.tokens import IDS

_CONTROL = re.compile("|".join(map(re.escape, IDS)))


class Part(StrEnum):
    """What a segment is in its prompt."""

    BOS = "bos"
    EFFORT = "effort"
    SYSTEM = "system"
    DEVELOPER = "developer"
    TOOLS = "tools"
    RESPONSE_FORMAT = "response_format"
    USER = "user"
    TOOL_RESULT = "tool_result"
    LATEST_REMINDER = "latest_reminder"
    HEADER = "header"  # <｜Assistant｜> and what opens or closes thinking
    REASONING = "reasoning"
    CONTENT = "content"
    TOOL_CALLS = "tool_calls"
    EOS = "eos"
    TASK = "task"


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt.

    Attributes:
        text: as it is spelled.
        is_control: exactly one control token; else text, whatever it spells.
        part: what it is.
        message: index of the message that it comes from; -1 for what comes from none.
    """

    text: str
    is_control: bool
    part: Part
    message: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """An encoded conversation."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """The prompt in one string, as DeepSeek's Python encoder gives it."""
        return "".join(segment.text for segment in self.segments)

    @property
    def control_ranges(self) -> list[tuple[int, int]]:
        """Where the control tokens stand in the text, [start, stop) each."""
        ranges, at = [], 0
        for segment in self.segments:
            if segment.is_control:
                ranges.append((at, at + len(segment.text)))
            at += len(segment.text)
        return ranges

    @property
    def spelled_tokens(self) -> list[tuple[int, str]]:
        """Control tokens that mere text spells: message and token. In `text` they look like real ones."""
        return [
            (segment.message, match[0])
            for segment in self.segments
            if not segment.is_control
            for match in _CONTROL.finditer(segment.text)
        ]


class PromptBuilder:
    """Collects segments."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []

    def control(self, token: str, part: Part, message: int) -> None:
        """Add a control token."""
        self._segments.append(Segment(token, True, part, message))

    def text(self, text: str, part: Part, message: int) -> None:
        """Add text; nothing for ""."""
        if text:
            self._segments.append(Segment(text, False, part, message))

    def fixed(self, text: str, part: Part, message: int) -> None:
        """Add a text of our own, in which what is spelled like a control token is one."""
        for piece, is_control in split_control(text):
            self._segments.append(Segment(piece, is_control, part, message))

    def prompt(self) -> Prompt:
        """What was collected."""
        return Prompt(tuple(self._segments))


def split_control(text: str) -> Iterator[tuple[str, bool]]:
    """Split a text at everything that is spelled like a control token: pieces, and whether each is one."""
    at = 0
    for match in _CONTROL.finditer(text):
        if match.start() > at:
            yield text[at : match.start()], False
        yield match[0], True
        at = match.end()
    if at < len(text):
        yield text[at:], False
