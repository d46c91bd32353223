"""Messages in the form of OpenAI's chat API, read as hostile input: each error names the message and the field.

What V4 adds: `reasoning_content` and `wo_eos` (no end of the sentence: a prefix to continue) on assistant messages,
`tools` and `response_format` on system and developer messages, `task` for quick instructions, and the roles developer
and latest_reminder. Keys that have no effect on the prompt are not looked at.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NoReturn

from v4quant.chat.tokens import TASKS
from v4quant.config_keys import show
from v4quant.errors import MessagesError

_SURROGATE = re.compile("[\ud800-\udfff]")


class Role(StrEnum):
    """Who speaks."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    LATEST_REMINDER = "latest_reminder"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the model.

    Attributes:
        name: of the function.
        arguments: JSON text, as the API has it.
        id: what its result refers to; "" where there is none.
    """

    name: str
    arguments: str
    id: str = ""

    def to_json(self) -> dict[str, Any]:
        """The call in the API's form; without an id where there is none."""
        own = {"id": self.id} if self.id else {}
        return {**own, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Message:
    """One message; fields that its role does not have are empty.

    Attributes:
        content: text; of a tool message in parts, joined.
        reasoning: of an assistant message.
        tool_calls: of an assistant message.
        tools: a line of JSON for each tool that the message declares.
        response_format: JSON text of the schema; None where there is none.
        tool_call_id: of a tool message, the call that it answers.
        task: name of a quick instruction, a key of tokens.TASKS; None for none.
        without_eos: the message is a prefix that the model continues.
    """

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[str, ...] = ()
    response_format: str | None = None
    tool_call_id: str = ""
    task: str | None = None
    without_eos: bool = False


def to_json_text(value: object) -> str:
    """JSON as the prompts have it: ", " and ": ", no escapes beyond ASCII, the order of keys kept."""
    return json.dumps(value, ensure_ascii=False)


def read_messages(data: object) -> list[Message]:
    """Check messages and take what the prompt says of them.

    Args:
        data: parsed JSON: an array of messages; or an object with `messages` and `tools`, as requests have them, whose
            tools the first message, a system message, then declares.

    Raises:
        MessagesError: naming the message and field that is wrong.
    """
    found: object = data
    tools: tuple[str, ...] = ()
    if isinstance(data, dict):
        unknown = sorted(set(map(str, data)) - {"messages", "tools"})
        if unknown:
            raise MessagesError(
                f"key {show(unknown[0])}, expected an array of messages, or an object of messages and tools"
            )
        found, tools = data.get("messages"), _Fields(data, "the request").tools()
    if not isinstance(found, list) or not found:
        raise MessagesError(f"messages is {show(found)}, expected an array of at least one message")
    messages = [_Fields(message, f"messages[{index}]").message() for index, message in enumerate(found)]
    return [_declaring(messages[0], tools), *messages[1:]] if tools else messages


def _declaring(first: Message, tools: tuple[str, ...]) -> Message:
    """The first message with the tools that the request declares."""
    if first.role is not Role.SYSTEM:
        raise MessagesError(
            f"messages[0].role is {show(str(first.role))}, expected system, to declare the request's tools",
            hint='Put it first: {"role": "system", "content": ""}',
        )
    if first.tools:
        raise MessagesError("messages[0].tools and the request's tools are both given, expected one")
    return replace(first, tools=tools)


class _Fields:
    """The fields of one message, or of something in it, read with their kinds checked."""

    def __init__(self, data: object, where: str) -> None:
        self.where = where
        if not isinstance(data, Mapping):
            raise MessagesError(f"{where} is {show(data)}, expected an object")
        self.data = data

    def wrong(self, key: str, expected: str, hint: str = "") -> NoReturn:
        found = f"is {show(self.data[key])}" if key in self.data else "is missing"
        raise MessagesError(f"{self.where}.{key} {found}, expected {expected}", hint=hint)

    def text(self, key: str) -> str:
        """A string; "" where it is absent or null."""
        value = self.data.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            self.wrong(key, "text")
        _require_encodable(value, f"{self.where}.{key}")
        return value

    def message(self) -> Message:
        """The whole message."""
        try:
            role = Role(str(self.data.get("role")))
        except ValueError:
            self.wrong("role", f"one of {', '.join(Role)}")
        if role is Role.TOOL:
            return Message(role, self._tool_content(), tool_call_id=self.text("tool_call_id"))
        content = self.text("content")
        if role in (Role.DEVELOPER, Role.LATEST_REMINDER) and not content:
            self.wrong("content", f"text, as the role is {role}")
        task = self._task()
        if role is Role.USER:
            return Message(role, content, task=task)
        return Message(
            role,
            content,
            reasoning=self.text("reasoning_content") if role is Role.ASSISTANT else "",
            tool_calls=self._tool_calls() if role is Role.ASSISTANT else (),
            tools=self.tools(),
            response_format=self._json_text("response_format") if self.data.get("response_format") else None,
            task=task,
            without_eos=role is Role.ASSISTANT and self._flag("wo_eos"),
        )

    def _flag(self, key: str) -> bool:
        value = self.data.get(key, False)
        if not isinstance(value, bool):
            self.wrong(key, "true or false")
        return value

    def _task(self) -> str | None:
        task = self.data.get("task")
        if task is not None and (not isinstance(task, str) or task not in TASKS):
            self.wrong("task", f"one of {', '.join(TASKS)}")
        return task

    def _tool_content(self) -> str:
        """Text, or the texts of a list; V4 reads no images, and says so to the model."""
        content = self.data.get("content")
        if not isinstance(content, list):
            return self.text("content")
        parts = []
        for index, element in enumerate(content):
            part = _Fields(element, f"{self.where}.content[{index}]")
            kind = part.text("type")
            parts.append(part.text("text") if kind == "text" else f"[Unsupported {kind}]")
        return "\n\n".join(parts)

    def tools(self) -> tuple[str, ...]:
        """A line of JSON for the function of each declared tool."""
        tools = self.data.get("tools")
        if tools is None:
            return ()
        if not isinstance(tools, list):
            self.wrong("tools", "an array")
        lines = []
        for index, element in enumerate(tools):
            tool = _Fields(element, f"{self.where}.tools[{index}]")
            if not isinstance(tool.data.get("function"), Mapping):
                tool.wrong("function", "an object with name, description and parameters")
            lines.append(tool._json_text("function"))
        return tuple(lines)

    def _json_text(self, key: str) -> str:
        try:
            text = to_json_text(self.data[key])
        except (TypeError, ValueError, RecursionError):
            self.wrong(key, "what JSON can hold")
        _require_encodable(text, f"{self.where}.{key}")
        return text

    def _tool_calls(self) -> tuple[ToolCall, ...]:
        calls = self.data.get("tool_calls")
        if calls is None:
            return ()
        if not isinstance(calls, list):
            self.wrong("tool_calls", "an array")
        return tuple(
            _Fields(call, f"{self.where}.tool_calls[{index}]")._tool_call() for index, call in enumerate(calls)
        )

    def _tool_call(self) -> ToolCall:
        function = _Fields(self.data.get("function"), f"{self.where}.function")
        name, arguments = function.text("name"), function.data.get("arguments")
        if not name:
            function.wrong("name", "a name")
        if not isinstance(arguments, str):
            function.wrong(
                "arguments", "JSON text, in quotes", hint='For example: "arguments": "{\\"city\\": \\"Oslo\\"}"'
            )
        return ToolCall(name, function.text("arguments"), self.text("id") or function.text("id"))


def _require_encodable(text: str, where: str) -> None:
    if match := _SURROGATE.search(text):
        raise MessagesError(f"{where} holds half a surrogate pair, {match[0]!a}, which no encoding of text has")
