"""Tool calls as the model writes them: DSML.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="NAME">
    <｜DSML｜parameter name="KEY" string="true|false">VALUE</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

A string is written raw with string="true", anything else as JSON with string="false". Nothing is escaped, so a few
names, keys and values cannot be written at all; they are refused.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from v4quant.chat.messages import ToolCall, to_json_text
from v4quant.chat.tokens import DSML
from v4quant.config_keys import show
from v4quant.errors import MessagesError

CALLS_BEGIN = f"<{DSML}tool_calls"
CALLS_END = f"</{DSML}tool_calls>"
INVOKE_BEGIN = f"<{DSML}invoke"
INVOKE_END = f"</{DSML}invoke>"
PARAMETER_BEGIN = f"<{DSML}parameter"
PARAMETER_END = f"/{DSML}parameter"  # with the "<" before it and the ">" after it
_UNWRITABLE = re.compile(f'"|{re.escape(DSML)}')

# Pieces of a rendered block: text, and True where it is the format's own, in which control tokens are real.
Pieces = Iterator[tuple[str, bool]]


def render_calls(calls: tuple[ToolCall, ...], where: str) -> Pieces:
    """Write a block of calls, in pieces of the format itself and of what the calls say.

    Args:
        where: what to call the message in errors.

    Raises:
        MessagesError: if the arguments of a call are JSON but no object, or something cannot be written.
    """
    yield f"{CALLS_BEGIN}>\n", True
    for index, call in enumerate(calls):
        yield from _render_call(call, f"{where}.tool_calls[{index}].function")
        yield "\n", True
    yield CALLS_END, True


def _render_call(call: ToolCall, where: str) -> Pieces:
    _require_writable(call.name, f"{where}.name")
    arguments = _arguments(call.arguments, where)
    yield f'{INVOKE_BEGIN} name="', True
    yield call.name, False
    yield '">\n', True
    for key, value in arguments.items():
        _require_writable(key, f"{where}.arguments: the key")
        text = value if isinstance(value, str) else to_json_text(value)
        if PARAMETER_END in text:
            raise MessagesError(
                f"{where}.arguments: the value of {show(key)} spells </{DSML}parameter>, which would end it: DSML has "
                "no escape",
                hint="Leave the call out, or change its value.",
            )
        yield f'{PARAMETER_BEGIN} name="', True
        yield key, False
        yield f'" string="{"true" if isinstance(value, str) else "false"}">', True
        yield text, False
        yield f"<{PARAMETER_END}>\n", True
    yield INVOKE_END if arguments else f"\n{INVOKE_END}", True


def _arguments(text: str, where: str) -> dict[str, Any]:
    """Arguments by name; text that is no JSON becomes one named `arguments`, as the released encoder has it."""

    def refuse(what: str) -> NoReturn:
        raise MessagesError(f"{where}.arguments {what}, expected a JSON object")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            refuse("holds a key twice")
        return result

    def finite(literal: str) -> float:
        value = float(literal)
        if value - value != 0:
            refuse(f"holds {literal[:20]}, which is no finite number")
        return value

    try:
        parsed = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError:
        refuse("is nested too deeply")
    except ValueError:
        return {"arguments": text}
    if not isinstance(parsed, dict):
        refuse(f"is {show(text)}")
    return parsed


def _require_writable(text: str, where: str) -> None:
    if match := _UNWRITABLE.search(text):
        raise MessagesError(
            f"{where} {show(text)} holds {show(match[0])}, which DSML cannot write in a name: it has no escape"
        )
