"""A completion to a message: reasoning, content and tool calls, checked strictly, with one kind of error.

A completion is everything after the generation header, the end of the sentence included:

    [reasoning </think>] content [calls] EOS

EOS may be missing after calls. An invoke may close itself, `<｜DSML｜invoke name="x"/>`: models write that for tools
without arguments. All else that the released parser refuses is refused, and so is a JSON value that is no JSON.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

from v4quant.chat.dsml import (
    CALLS_BEGIN,
    CALLS_END,
    INVOKE_BEGIN,
    INVOKE_END,
    PARAMETER_BEGIN,
    PARAMETER_END,
)
from v4quant.chat.messages import ToolCall, to_json_text
from v4quant.chat.tokens import BOS, DSML, END_THINK, EOS, THINK
from v4quant.config_keys import show
from v4quant.errors import CompletionError

# In text, only these are taken for control tokens; token ids tell all of them from text.
_STRUCTURE = (BOS, EOS, THINK, END_THINK, DSML)
_STRUCTURE_PATTERN = re.compile("|".join(map(re.escape, _STRUCTURE)))
_INVOKE_NAME = re.compile(r'\s*name="([^"]+)"(/?)>\n\n?')
_PARAMETER_HEAD = re.compile(r' name="([^"]*)" string="(true|false)">')


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model said.

    Attributes:
        content: the answer.
        reasoning: "" in chat mode.
        tool_calls: in order, without ids.
    """

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]

    def to_json(self) -> dict[str, Any]:
        """The assistant message in the API's form."""
        return {
            "role": "assistant",
            "content": self.content,
            "reasoning_content": self.reasoning,
            "tool_calls": [call.to_json() for call in self.tool_calls],
        }


def parse_completion(text: str, *, thinking: bool) -> Completion:
    """Parse a completion's text, in which everything spelled like a structural token is one.

    Args:
        text: everything after the generation header.
        thinking: the header ended in <think>.

    Raises:
        CompletionError: saying what is not well formed, and where.
    """
    return _Parser(text, {match.start() for match in _STRUCTURE_PATTERN.finditer(text)}).parse(thinking)


def parse_segments(segments: Iterable[tuple[str, bool]], *, thinking: bool) -> Completion:
    """Parse a completion whose control tokens are known, as token ids tell them (Tokenizer.segments).

    Args:
        segments: pieces of the completion, and whether each is a control token.
        thinking: the header ended in <think>.

    Raises:
        CompletionError: saying what is not well formed, and where.
    """
    pieces = list(segments)
    starts = accumulate((len(text) for text, _ in pieces), initial=0)
    controls = {start for start, (_, is_control) in zip(starts, pieces, strict=False) if is_control}
    return _Parser("".join(text for text, _ in pieces), controls).parse(thinking)


class _Parser:
    """Reads a text from left to right.

    Args:
        text: the completion.
        controls: where control tokens start.
    """

    def __init__(self, text: str, controls: set[int]) -> None:
        self._text = text
        self._controls = controls
        self._at = 0

    def parse(self, thinking: bool) -> Completion:
        """Read the whole completion."""
        reasoning = ""
        if thinking:
            end = self._find(END_THINK)
            if end < 0:
                self._fail(f"has no {END_THINK}, expected one after the reasoning")
            reasoning = self._plain(end, "the reasoning")
            self._at += len(END_THINK)
        calls_at, eos_at = self._find(f"\n\n{CALLS_BEGIN}"), self._find(EOS)
        if calls_at < 0 and eos_at < 0:
            self._fail(f"does not end in {EOS}: it was cut off")
        has_calls = calls_at >= 0 and (eos_at < 0 or calls_at < eos_at)
        content = self._plain(calls_at if has_calls else eos_at, "the content")
        calls = self._calls() if has_calls else ()
        if not has_calls or self._at < len(self._text):
            self._expect(EOS)
        if self._at < len(self._text):
            self._fail("goes on after its end")
        return Completion(content, reasoning, calls)

    def _calls(self) -> tuple[ToolCall, ...]:
        self._expect(f"\n\n{CALLS_BEGIN}>\n")
        calls = []
        while self._is_next(INVOKE_BEGIN):
            calls.append(self._invoke())
        if not calls:
            self._fail(f"has a block of tool calls without {INVOKE_BEGIN}")
        self._expect(CALLS_END)
        return tuple(calls)

    def _invoke(self) -> ToolCall:
        self._expect(INVOKE_BEGIN)
        head = self._match(_INVOKE_NAME, 'expected name="NAME"> and a new line')
        name, closes = head[1], bool(head[2])
        arguments: dict[str, str] = {}
        while not closes and self._is_next(PARAMETER_BEGIN):
            key, value = self._parameter()
            if key in arguments:
                self._fail(f"has the parameter {show(key)} twice in one call")
            arguments[key] = value
        if not closes:
            self._expect(f"{INVOKE_END}\n")
        return ToolCall(
            name, "{" + ", ".join(f"{to_json_text(key)}: {value}" for key, value in arguments.items()) + "}"
        )

    def _parameter(self) -> tuple[str, str]:
        """A key, and its value as JSON text."""
        self._expect(PARAMETER_BEGIN)
        head = self._match(_PARAMETER_HEAD, 'expected name="KEY" string="true|false">')
        end = self._find(f"<{PARAMETER_END}")
        if end < 0:
            self._fail(f"has no end of the parameter {show(head[1])}")
        value = self._text[self._at : end]
        if head[2] == "true":
            value = to_json_text(value)
        elif not _is_json(value):
            self._fail(f'has {show(value)} for the parameter {show(head[1])}, expected JSON, as it has string="false"')
        self._at = end
        self._expect(f"<{PARAMETER_END}>\n")
        return head[1], value

    def _find(self, literal: str) -> int:
        """Where a literal with one control token comes next, the token being real; -1 if nowhere."""
        token = next(token for token in _STRUCTURE if token in literal)
        offset = literal.index(token)
        at = self._text.find(literal, self._at)
        while at >= 0 and at + offset not in self._controls:
            at = self._text.find(literal, at + 1)
        return at

    def _is_next(self, literal: str) -> bool:
        token = next(token for token in _STRUCTURE if token in literal)
        return self._text.startswith(literal, self._at) and self._at + literal.index(token) in self._controls

    def _expect(self, literal: str) -> None:
        if not self._is_next(literal):
            found = self._text[self._at : self._at + len(literal)]
            self._fail(f"has {show(found) if found else 'its end'}, expected {show(literal)}")
        self._at += len(literal)

    def _match(self, pattern: re.Pattern[str], expected: str) -> re.Match[str]:
        match = pattern.match(self._text, self._at)
        if match is None or any(at in self._controls for at in range(match.start(), match.end())):
            self._fail(f"has {show(self._text[self._at : self._at + 40])}, {expected}")
        self._at = match.end()
        return match

    def _plain(self, end: int, what: str) -> str:
        """The text up to a position, in which no control token may stand."""
        if inside := [at for at in self._controls if self._at <= at < end]:
            self._at = min(inside)
            self._fail(f"has a control token in {what}, {show(self._text[self._at : self._at + 20])}")
        text = self._text[self._at : end]
        self._at = end
        return text

    def _fail(self, what: str) -> NoReturn:
        raise CompletionError(f"the completion, at character {self._at:,}, {what}")


def _is_json(text: str) -> bool:
    """Whether a text is JSON; without making numbers of its digits."""

    def refuse(literal: str) -> NoReturn:
        raise ValueError(literal)

    try:
        json.loads(text, parse_int=len, parse_float=len, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True
