"""Messages to V4's prompt.

    BOS [effort] system [tools] [format], then turns of
    <｜User｜> text <｜Assistant｜> <think> reasoning </think> content [calls] EOS

In chat mode, and in turns whose reasoning is dropped, `</think>` follows `<｜Assistant｜>` at once. Reasoning is kept
across user turns if any message declares tools, and otherwise dropped before the last user turn. Source: the encoders
that the releases ship, with which the text agrees byte for byte wherever they are well defined.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from v4quant.chat.dsml import render_calls
from v4quant.chat.messages import Message, Role
from v4quant.chat.segments import Part, Prompt, PromptBuilder
from v4quant.chat.texts import EFFORT_ALIASES, EFFORT_TEXTS, RESPONSE_FORMAT, TOOLS_HEAD, TOOLS_TAIL, Encoder
from v4quant.chat.tokens import ASSISTANT, BOS, END_THINK, EOS, LATEST_REMINDER, TASKS, THINK, USER
from v4quant.chat.turns import Turn, drop_reasoning, last_user_turn, merge_turns
from v4quant.errors import UsageError

_JOIN = "\n\n"


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How a conversation is to be encoded.

    Attributes:
        thinking: the model thinks before it answers.
        effort: "low", "high", "max", or an alias; None says nothing.
        encoder: of which releases; it decides what an effort says.
        drop_reasoning: drop the reasoning of earlier turns where no message declares tools.
    """

    thinking: bool = False
    effort: str | None = None
    encoder: Encoder = Encoder.LATER
    drop_reasoning: bool = True

    @property
    def effort_text(self) -> str:
        """The text after BOS.

        Raises:
            UsageError: if the encoder knows no such effort.
        """
        if self.effort is None:
            return ""
        texts, aliases = EFFORT_TEXTS[self.encoder], EFFORT_ALIASES[self.encoder]
        text = texts.get(aliases.get(self.effort, self.effort))
        if text is None:
            raise UsageError(
                f"effort is {self.effort!r}, expected one of {', '.join([*texts, *aliases])}, as the encoder is "
                f"{self.encoder}"
            )
        return text if self.thinking else ""


def encode(messages: Sequence[Message], options: EncodeOptions) -> Prompt:
    """Encode a conversation: to be answered if it ends in a user's or a tool's message, else as it stands.

    Raises:
        MessagesError: if a message has no form in the prompt.
        UsageError: if the options do not fit each other.
    """
    effort = options.effort_text
    turns = merge_turns(messages)
    drops = options.thinking and options.drop_reasoning and not any(message.tools for message in messages)
    if drops:
        turns = drop_reasoning(turns)
    return _Rendering(turns, options.thinking, drops, effort).prompt()


class _Rendering:
    """One conversation on its way into segments.

    Args:
        turns: what is to be rendered.
        thinking: the mode.
        drops: reasoning before the last user turn is dropped.
        effort: the text after BOS.
    """

    def __init__(self, turns: list[Turn], thinking: bool, drops: bool, effort: str) -> None:
        self._turns = turns
        self._thinking = thinking
        self._last_user = last_user_turn(turns)
        self._drops = drops
        self._out = PromptBuilder()
        self._out.control(BOS, Part.BOS, -1)
        self._out.text(effort, Part.EFFORT, -1)

    def prompt(self) -> Prompt:
        """Render everything."""
        for at, turn in enumerate(self._turns):
            if turn.role is Role.SYSTEM:
                self._out.text(turn.message.content, Part.SYSTEM, turn.index)
                self._declarations(turn)
            elif turn.role is Role.DEVELOPER:
                self._out.control(USER, Part.DEVELOPER, turn.index)
                self._out.text(turn.message.content, Part.DEVELOPER, turn.index)
                self._declarations(turn)
            elif turn.role is Role.LATEST_REMINDER:
                self._out.control(LATEST_REMINDER, Part.LATEST_REMINDER, turn.index)
                self._out.text(turn.message.content, Part.LATEST_REMINDER, turn.index)
            elif turn.role is Role.USER:
                self._user(turn)
            else:
                self._assistant(at, turn)
            self._transition(at, turn)
        return self._out.prompt()

    def _declarations(self, turn: Turn) -> None:
        message, index = turn.message, turn.index
        if message.tools:
            self._out.text(_JOIN, Part.TOOLS, index)
            self._out.fixed(TOOLS_HEAD, Part.TOOLS, index)
            self._out.text("\n".join(message.tools), Part.TOOLS, index)
            self._out.text(TOOLS_TAIL, Part.TOOLS, index)
        if message.response_format is not None:
            self._out.text(RESPONSE_FORMAT + message.response_format, Part.RESPONSE_FORMAT, index)

    def _user(self, turn: Turn) -> None:
        self._out.control(USER, Part.USER, turn.index)
        for at, piece in enumerate(turn.pieces):
            part = Part.TOOL_RESULT if piece.is_result else Part.USER
            text = f"<tool_result>{piece.text}</tool_result>" if piece.is_result else piece.text
            self._out.text((_JOIN if at else "") + text, part, piece.message)

    def _assistant(self, at: int, turn: Turn) -> None:
        message, index = turn.message, turn.index
        answers_task = at > 0 and self._turns[at - 1].task is not None
        if self._thinking and not answers_task and (not self._drops or at > self._last_user):
            self._out.text(message.reasoning, Part.REASONING, index)
            self._out.control(END_THINK, Part.REASONING, index)
        self._out.text(message.content, Part.CONTENT, index)
        if message.tool_calls:
            self._out.text(_JOIN, Part.TOOL_CALLS, index)
            for text, is_fixed in render_calls(message.tool_calls, f"messages[{index}]"):
                (self._out.fixed if is_fixed else self._out.text)(text, Part.TOOL_CALLS, index)
        if not message.without_eos:
            self._out.control(EOS, Part.EOS, index)

    def _transition(self, at: int, turn: Turn) -> None:
        """What follows a turn that is answered: its task, or the header of the answer."""
        is_last = at + 1 == len(self._turns)
        if not is_last and self._turns[at + 1].role not in (Role.ASSISTANT, Role.LATEST_REMINDER):
            return
        if turn.task is not None:
            if turn.task == "action":
                self._header(turn, opens=self._thinking)
            self._out.control(TASKS[turn.task], Part.TASK, turn.index)
        elif turn.role in (Role.USER, Role.DEVELOPER):
            self._header(turn, opens=self._thinking and (not self._drops or at >= self._last_user))

    def _header(self, turn: Turn, *, opens: bool) -> None:
        self._out.control(ASSISTANT, Part.HEADER, turn.index)
        self._out.control(THINK if opens else END_THINK, Part.HEADER, turn.index)
