"""Random conversations and tool calls, hostile in their texts, well formed in their shape."""

import json
import random
from typing import Any

_TEXTS = (
    "",
    " ",
    "hello",
    "a\nb\n\n",
    "  spaces  and\ttabs",
    "x\n    - y",
    "naïve café 北京 日本語 🙂👩‍👩‍👧",
    "a < b </p> &amp; {} [] \"quoted\" 'single' \\ back\\nslash",
    "12345 1e3 007",
    "\r\n\u2028\u00a0\ufeff",
    "<tool_result>no</tool_result>",
    "</｜DSML >",
    "｜ DSML ｜",
    "<|User|>",
)
# Texts that spell control tokens; a string cannot tell them from real ones, token ids can.
SPELLED = (
    "</think>",
    "<think>",
    "<｜User｜>",
    "a<｜Assistant｜>b",
    "<｜end▁of▁sentence｜>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
)
_NAMES = ("f", "get_weather", "search-web", "a.b", "名前", "x y", "<b>")
_KEYS = ("a", "city", "ключ", "k k", "string", "=", "<", "a'b", "x\\y")


def text(rng: random.Random, spelled: bool = False) -> str:
    """Some text; with `spelled` it may spell control tokens."""
    pool = _TEXTS + SPELLED if spelled else _TEXTS
    return "".join(rng.choice(pool) for _ in range(rng.randint(0, 3)))


def value(rng: random.Random, depth: int = 2) -> Any:
    """A JSON value."""
    kind = rng.randrange(8 if depth else 6)
    if kind == 0:
        return text(rng)
    if kind == 1:
        return rng.choice([0, -1, 7, 10**15, -(10**18)])
    if kind == 2:
        return rng.choice([1.0, 0.5, -2.25, 1.5e300, 0.1])
    if kind == 3:
        return rng.choice([True, False])
    if kind == 4:
        return None
    if kind == 5:
        return rng.choice(["", "true", "1", "{}", "null"])
    if kind == 6:
        return [value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return {key: value(rng, depth - 1) for key in rng.sample(_KEYS, rng.randint(0, 3))}


def arguments(rng: random.Random, least: int = 0) -> str:
    """Arguments of a call: JSON text of an object."""
    keys = rng.sample(_KEYS, rng.randint(least, 4))
    return json.dumps({key: value(rng) for key in keys}, ensure_ascii=rng.random() < 0.5)


def tool(rng: random.Random) -> dict[str, Any]:
    """A declared tool."""
    properties = {key: {"type": rng.choice(["string", "number"])} for key in rng.sample(_KEYS, rng.randint(0, 3))}
    function = {
        "name": rng.choice(_NAMES),
        "description": text(rng),
        "parameters": {"type": "object", "properties": properties, "required": list(properties)[:1]},
    }
    return {"type": "function", "function": function}


def conversation(rng: random.Random, *, thinking: bool, spelled: bool = False) -> list[dict[str, Any]]:
    """Messages that end in a user's or a tool's, with parallel calls, results out of order, and texts after them.

    What deepseek-recipe is known to do otherwise is left out; test_differences.py has it: empty texts of users, calls
    without arguments or with ids that are not in order as text, reminders after users, reasoning that is missing or
    that chat mode would drop.
    """
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.6:
        messages.append({"role": "system", "content": text(rng, spelled)})
    if rng.random() < 0.5:
        if not messages:
            messages.append({"role": "system", "content": ""})
        messages[0]["tools"] = [tool(rng) for _ in range(rng.randint(1, 3))]
    calls = 0
    for turn in range(rng.randint(1, 4)):
        if rng.random() < 0.15 and messages and messages[-1]["role"] == "assistant":
            messages.append({"role": "latest_reminder", "content": text(rng, spelled) or "now"})
        for _ in range(rng.choice([1, 1, 1, 2])):
            messages.append({"role": "user", "content": text(rng, spelled) or "u"})
        for _ in range(rng.randint(0, 2)):
            answer: dict[str, Any] = {"role": "assistant", "content": text(rng, spelled)}
            if thinking:
                answer["reasoning_content"] = text(rng, spelled)
            messages.append(answer)
            ids = [f"c{calls + number:05d}" for number in range(rng.choice([0, 1, 1, 3]))]
            calls += len(ids)
            if not ids:
                break
            answer["tool_calls"] = [
                {
                    "id": own,
                    "type": "function",
                    "function": {"name": rng.choice(_NAMES), "arguments": arguments(rng, 1)},
                }
                for own in ids
            ]
            rng.shuffle(ids)
            messages += [{"role": "tool", "tool_call_id": own, "content": text(rng, spelled)} for own in ids]
        if messages[-1]["role"] == "assistant" and turn == 3:
            break
    if messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": text(rng, spelled) or "u"})
    return messages
