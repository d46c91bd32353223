"""Every form of the prompt, written out; fixed texts by the hashes of the released ones."""

import hashlib
import json
from typing import Any

import pytest

from v4quant.chat import EncodeOptions, Encoder, Part, encode, read_messages
from v4quant.chat.texts import EFFORT_TEXTS, TOOLS_HEAD, TOOLS_TAIL
from v4quant.errors import MessagesError, UsageError

B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TEXT_A, TEXT_B = EFFORT_TEXTS[Encoder.PREVIEW]["max"], EFFORT_TEXTS[Encoder.LATER]["max"]
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
TOOLS = f"\n\n{TOOLS_HEAD}{json.dumps(FUNCTION)}{TOOLS_TAIL}"


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str, reasoning: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **more}


def system(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": content, **more}


def result(content: Any, call_id: str = "") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def call(arguments: str, name: str = "f", call_id: str = "") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def invoke(*parameters: tuple[str, str, str]) -> str:
    """The text of one call of f."""
    lines = [f'<｜DSML｜parameter name="{k}" string="{s}">{v}</｜DSML｜parameter>\n' for k, s, v in parameters]
    return f'<｜DSML｜invoke name="f">\n{"".join(lines) or chr(10)}</｜DSML｜invoke>\n'


def calls(*invokes: str) -> str:
    return f"\n\n<｜DSML｜tool_calls>\n{''.join(invokes)}</｜DSML｜tool_calls>"


def chat(*messages: dict[str, Any]) -> str:
    return encode(read_messages(list(messages)), EncodeOptions()).text


def think(*messages: dict[str, Any], **options: Any) -> str:
    return encode(read_messages(list(messages)), EncodeOptions(thinking=True, **options)).text


def refusal(*messages: object) -> str:
    with pytest.raises(MessagesError) as caught:
        encode(read_messages(list(messages)), EncodeOptions(thinking=True))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 300
    return message


@pytest.mark.parametrize(
    ("text", "characters", "sha256"),
    [
        (TOOLS_HEAD, 854, "c7c9042638154a237b5d1bd48be772374a35a4d24c5cacfd1ffbd92703da329c"),
        (TOOLS_TAIL, 99, "690702850fe256512cb1ee67c4e436ecb3e735c71ebee77ca45ff357a75fb5a7"),
        (TEXT_A, 476, "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7"),
        (TEXT_B, 526, "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c"),
    ],
)
def test_fixed_texts_are_the_released_ones(text: str, characters: int, sha256: str) -> None:
    assert (len(text), hashlib.sha256(text.encode()).hexdigest()) == (characters, sha256)


# Modes and reasoning.


def test_the_two_modes() -> None:
    assert chat(user("p")) == f"{B}{U}p{A}</think>"
    assert think(user("p")) == f"{B}{U}p{A}<think>"
    assert chat(system("s"), user("p")) == f"{B}s{U}p{A}</think>"
    assert chat(user("p"), assistant("c", "r"), user("q")) == f"{B}{U}p{A}</think>c{E}{U}q{A}</think>"


@pytest.mark.parametrize("users", [1, 2, 3])
@pytest.mark.parametrize("has_calls", [False, True])
@pytest.mark.parametrize("has_tools", [False, True])
@pytest.mark.parametrize("thinking", [False, True])
def test_when_reasoning_is_kept(thinking: bool, has_tools: bool, has_calls: bool, users: int) -> None:
    """Tools declared is what counts, not whether any was called; without them it ends at the last user turn."""
    messages = [system("", tools=[TOOL])] if has_tools else [system("")]
    for turn in range(users):
        messages += [
            user(f"p{turn}"),
            assistant(f"c{turn}", f"r{turn}", tool_calls=[call("{}")] if has_calls else None),
        ]
        if has_calls:
            messages += [result("out"), assistant(f"d{turn}", f"s{turn}")]
    text = encode(read_messages(messages), EncodeOptions(thinking=thinking)).text
    for turn in range(users):
        is_last = turn == users - 1
        for reasoning, content in ((f"r{turn}", f"c{turn}"), (f"s{turn}", f"d{turn}"))[: 1 + has_calls]:
            # A tool result is a user turn by then: inside one tool loop, too, only what follows the last one is kept.
            is_after_last_user = is_last and (not has_calls or reasoning.startswith("s"))
            if thinking and (has_tools or is_after_last_user):
                assert f"{A}<think>{reasoning}</think>{content}" in text
            else:
                assert f"{A}</think>{content}" in text
                assert reasoning not in text


def test_keep_reasoning_without_tools() -> None:
    messages = [user("p"), assistant("c", "r"), user("q")]
    assert think(*messages) == f"{B}{U}p{A}</think>c{E}{U}q{A}<think>"
    assert think(*messages, drop_reasoning=False) == f"{B}{U}p{A}<think>r</think>c{E}{U}q{A}<think>"


def test_a_kept_turn_without_reasoning() -> None:
    assert f"{U}p{A}<think></think>c{E}" in think(system("", tools=[TOOL]), user("p"), assistant("c"), user("q"))


def test_a_conversation_that_ends_in_an_answer() -> None:
    assert think(user("p"), assistant("c", "r")) == f"{B}{U}p{A}<think>r</think>c{E}"
    assert think(user("p"), assistant("c", "r", wo_eos=True)) == f"{B}{U}p{A}<think>r</think>c"
    assert chat(user("p"), assistant("c"), assistant("d")) == f"{B}{U}p{A}</think>c{E}d{E}"


@pytest.mark.parametrize(
    ("encoder", "level", "text"),
    [
        (Encoder.PREVIEW, None, ""),
        (Encoder.PREVIEW, "high", ""),
        (Encoder.PREVIEW, "max", TEXT_A),
        (Encoder.LATER, None, ""),
        (Encoder.LATER, "low", ""),
        (Encoder.LATER, "minimal", ""),
        (Encoder.LATER, "high", TEXT_A),
        (Encoder.LATER, "medium", TEXT_A),
        (Encoder.LATER, "xhigh", TEXT_A),
        (Encoder.LATER, "max", TEXT_B),
    ],
)
def test_effort_by_release(encoder: Encoder, level: str | None, text: str) -> None:
    messages = read_messages([system("s"), user("p")])
    assert encode(messages, EncodeOptions(True, level, encoder)).text == f"{B}{text}s{U}p{A}<think>"
    assert encode(messages, EncodeOptions(False, level, encoder)).text == f"{B}s{U}p{A}</think>"


@pytest.mark.parametrize(
    ("encoder", "level"), [("preview", "low"), ("preview", "medium"), ("later", "hard"), ("later", "")]
)
@pytest.mark.parametrize("thinking", [False, True])
def test_efforts_that_a_release_does_not_know(thinking: bool, encoder: str, level: str) -> None:
    with pytest.raises(UsageError, match=r"effort is '.*', expected one of "):
        encode(read_messages([user("p")]), EncodeOptions(thinking, level, Encoder(encoder)))


# Roles.


def test_tools_and_response_format() -> None:
    schema = {"type": "object", "title": "Zürich"}
    form = (
        "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "object", "title": "Zürich"}'
    )
    assert chat(system("", tools=[TOOL]), user("p")) == f"{B}{TOOLS}{U}p{A}</think>"
    assert chat(system("s", tools=[TOOL], response_format=schema)) == f"{B}s{TOOLS}{form}"
    two = chat(system("s", tools=[TOOL, TOOL]))
    assert f"{json.dumps(FUNCTION)}\n{json.dumps(FUNCTION)}{TOOLS_TAIL}" in two
    developer = {"role": "developer", "content": "d", "tools": [TOOL], "response_format": schema}
    assert chat(developer) == f"{B}{U}d{TOOLS}{form}{A}</think>"
    assert chat(system("s", tools=[]), user("p")) == f"{B}s{U}p{A}</think>"


def test_tools_of_a_request() -> None:
    for first in (system(""), system("s", response_format={"a": 1}, task="query")):
        declared = read_messages({"messages": [first, user("p")], "tools": [TOOL]})
        assert declared == read_messages([{**first, "tools": [TOOL]}, user("p")])
    assert read_messages({"messages": [user("p")], "tools": []}) == read_messages([user("p")])


def test_developers_vanish_before_the_last_user_without_tools() -> None:
    messages = [{"role": "developer", "content": "d"}, assistant("c", "r"), user("p")]
    assert think(*messages) == f"{B}c{E}{U}p{A}<think>"
    assert think(*messages, drop_reasoning=False) == f"{B}{U}d{A}<think>r</think>c{E}{U}p{A}<think>"
    assert chat(*messages) == f"{B}{U}d{A}</think>c{E}{U}p{A}</think>"
    # The last user may itself be one.
    assert think(user("p"), assistant("c", "r"), messages[0]) == f"{B}{U}p{A}</think>c{E}{U}d{A}<think>"


def test_latest_reminder() -> None:
    reminder = {"role": "latest_reminder", "content": "2026"}
    assert chat(reminder, user("p")) == f"{B}<｜latest_reminder｜>2026{U}p{A}</think>"
    assert chat(user("p"), reminder) == f"{B}{U}p{A}</think><｜latest_reminder｜>2026"


def test_fields_that_a_user_message_does_not_have() -> None:
    more = {"tools": [TOOL], "response_format": {"a": 1}, "mask": 1, "name": "x", "content_blocks": [], "wo_eos": True}
    assert think(user("p", **more), assistant("c", "r"), user("q")) == f"{B}{U}p{A}</think>c{E}{U}q{A}<think>"


# User turns.


def test_results_and_texts_share_a_turn() -> None:
    made = assistant("", tool_calls=[call("{}", call_id=own) for own in ("c10", "c9", "c8")])
    results = [result("three", "c8"), result("one", "c10"), user("and"), result("two", "c9"), user("?")]
    turn = chat(user("p"), made, *results).split(E)[-1]
    parts = [
        "<tool_result>one</tool_result>",
        "<tool_result>two</tool_result>",
        "and",
        "<tool_result>three</tool_result>",
        "?",
    ]
    assert turn == f"{U}{(chr(10) * 2).join(parts)}{A}</think>"


def test_order_of_results() -> None:
    """Unknown ids count as the first call's; results of an earlier loop are not sorted by a later one's calls."""
    made = assistant("", tool_calls=[call("{}", call_id="a"), call("{}", call_id="b")])
    turn = chat(made, result("b", "b"), result("?", "x"), result("a", "a")).split(E)[-1]
    assert turn.startswith(f"{U}<tool_result>?</tool_result>\n\n<tool_result>a</tool_result>\n\n<tool_result>b")
    again = assistant("", tool_calls=[call("{}", call_id="b"), call("{}", call_id="a")])
    turn = chat(made, result("1", "a"), assistant("text"), again, result("a", "a"), result("b", "b")).split(E)[-1]
    assert turn.startswith(f"{U}<tool_result>b</tool_result>\n\n<tool_result>a")


def test_content_of_tools_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "</b>"}]
    assert chat(result(parts)) == f"{B}{U}<tool_result>a\n\n[Unsupported image_url]\n\n</b></tool_result>{A}</think>"
    assert chat(result(None)) == f"{B}{U}<tool_result></tool_result>{A}</think>"


def test_users_in_a_row() -> None:
    assert chat(user("p"), user(""), user("q")) == f"{B}{U}p\n\n\n\nq{A}</think>"
    assert chat(user("p", task="query"), user("q")) == f"{B}{U}p{U}q{A}</think>", "a task that is not last is not said"
    assert chat(user("p", task="query"), result("r")) == f"{B}{U}p\n\n<tool_result>r</tool_result><｜query｜>"


# Tasks.


@pytest.mark.parametrize("task", ["query", "authority", "domain", "read_url"])
def test_tasks_after_a_user(task: str) -> None:
    for render in (chat, think):
        assert render(user("p", task=task)) == f"{B}{U}p<｜{task}｜>"
        assert render(user("p", task=task), assistant("c", "r")) == f"{B}{U}p<｜{task}｜>c{E}", "no thinking part"


def test_action_and_title() -> None:
    assert chat(user("p", task="action")) == f"{B}{U}p{A}</think><｜action｜>"
    assert think(user("p", task="action")) == f"{B}{U}p{A}<think><｜action｜>"
    assert chat(user("p"), assistant("c", task="title")) == f"{B}{U}p{A}</think>c{E}<｜title｜>"
    assert think(user("p"), assistant("c", "r", task="title"), assistant("t", "x")) == (
        f"{B}{U}p{A}<think>r</think>c{E}<｜title｜>t{E}"
    )


# Calls.


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        ('{"a": "x"}', [("a", "true", "x")]),
        (
            '{"a":"x\\ny \\"z\\"", "b":1.0,"c":true, "d":null}',
            [("a", "true", 'x\ny "z"'), ("b", "false", "1.0"), ("c", "false", "true"), ("d", "false", "null")],
        ),
        (
            '{"n": 1e3, "m": 12345678901234567890123}',
            [("n", "false", "1000.0"), ("m", "false", "12345678901234567890123")],
        ),
        ('{"a": {"k": [1, "ü"]}}', [("a", "false", '{"k": [1, "ü"]}')]),
        ("{}", []),
        ('{"": 1, "a\\nb": 2}', [("", "false", "1"), ("a\nb", "false", "2")]),
        ("not json", [("arguments", "true", "not json")]),
        ("", [("arguments", "true", "")]),
        ('{"a": ', [("arguments", "true", '{"a": ')]),
    ],
)
def test_arguments(arguments: str, parameters: list[tuple[str, str, str]]) -> None:
    text = chat(user("p"), assistant("c", tool_calls=[call(arguments)]))
    assert text == f"{B}{U}p{A}</think>c{calls(invoke(*parameters))}{E}"


def test_parallel_calls() -> None:
    made = assistant("c", "r", tool_calls=[call('{"a": 1}'), call("{}")])
    assert think(user("p"), made) == (f"{B}{U}p{A}<think>r</think>c{calls(invoke(('a', 'false', '1')), invoke())}{E}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("[1]", "arguments is '[1]', expected a JSON object"),
        ("3", "expected a JSON object"),
        ('"x"', "expected a JSON object"),
        ("null", "expected a JSON object"),
        ('{"a": NaN}', "holds NaN, which is no finite number"),
        ('{"a": 1e999}', "holds 1e999, which is no finite number"),
        ('{"a": 1, "a": 2}', "holds a key twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deeply"),
        ('{"a": "</｜DSML｜parameter>"}', "the value of 'a' spells"),
        ('{"a": ["</｜DSML｜parameter>"]}', "the value of 'a' spells"),
        ('{"a\\"b": 1}', "DSML cannot write in a name"),
        ('{"a｜DSML｜": 1}', "DSML cannot write in a name"),
    ],
)
def test_calls_that_cannot_be_written(arguments: str, says: str) -> None:
    message = refusal(user("p"), assistant("", tool_calls=[call("{}"), call(arguments)])).replace("\\uff5c", "｜")
    assert message.startswith("messages[1].tool_calls[1].function.arguments")
    assert says in message


def test_names_that_cannot_be_written() -> None:
    for name in ('f"', "f｜DSML｜"):
        message = refusal(assistant("", tool_calls=[call("{}", name)]))
        assert message.startswith("messages[0].tool_calls[0].function.name ")


# Wrong messages.


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("hello", "messages[0] is 'hello', expected an object"),
        (None, "messages[0] is null"),
        ({}, "messages[0].role is missing, expected one of system, developer, user, assistant, tool, latest_reminder"),
        ({"role": "function"}, "messages[0].role is 'function'"),
        ({"role": ["user"]}, "messages[0].role is ['user']"),
        ({"role": {}}, "messages[0].role is an object"),
        (user(["p"]), "messages[0].content is ['p'], expected text"),  # type: ignore[arg-type]
        (user(3), "messages[0].content is 3, expected text"),  # type: ignore[arg-type]
        (user("a\ud800"), "messages[0].content holds half a surrogate pair, '\\ud800'"),
        (user("p", task="summary"), "messages[0].task is 'summary', expected one of action, query"),
        (user("p", task=1), "messages[0].task is 1"),
        ({"role": "developer"}, "messages[0].content is missing, expected text, as the role is developer"),
        ({"role": "latest_reminder", "content": ""}, "messages[0].content is ''"),
        (assistant("", "r", wo_eos=1), "messages[0].wo_eos is 1, expected true or false"),
        (assistant("", 1), "messages[0].reasoning_content is 1"),  # type: ignore[arg-type]
        (assistant("", tool_calls={}), "messages[0].tool_calls is an object of 0 keys, expected an array"),
        (assistant("", tool_calls=["f"]), "messages[0].tool_calls[0] is 'f'"),
        (assistant("", tool_calls=[{}]), "messages[0].tool_calls[0].function is null"),
        (
            assistant("", tool_calls=[{"function": {"arguments": "{}"}}]),
            "messages[0].tool_calls[0].function.name is missing",
        ),
        (
            assistant("", tool_calls=[{"function": {"name": "f", "arguments": {}}}]),
            "function.arguments is an object of 0 keys, expected JSON text",
        ),
        (
            assistant("", tool_calls=[{"function": {"name": "f"}}]),
            "messages[0].tool_calls[0].function.arguments is missing",
        ),
        (assistant("", tool_calls=[{"id": 7, **call("{}")} | {"id": 7}]), "messages[0].tool_calls[0].id is 7"),
        (result([1]), "messages[0].content[0] is 1"),
        (result([{"type": "text", "text": 1}]), "messages[0].content[0].text is 1"),
        (result("r") | {"tool_call_id": 1}, "messages[0].tool_call_id is 1"),
        (system("", tools={}), "messages[0].tools is an object of 0 keys, expected an array"),
        (system("", tools=[FUNCTION]), "messages[0].tools[0].function is missing"),
        (
            system("", tools=[{"function": {"a": {1}}}]),
            "messages[0].tools[0].function is an object of 1 keys, expected what JSON",
        ),
        (system("", response_format={"a": "\udc00"}), "messages[0].response_format holds half a surrogate pair"),
    ],
)
def test_wrong_messages(message: object, says: str) -> None:
    assert says in refusal(message)


@pytest.mark.parametrize("data", [None, [], "p", 3, {}, {"messages": []}, {"messages": {}}])
def test_no_messages(data: object) -> None:
    with pytest.raises(MessagesError, match=r"messages is .*, expected an array of at least one message"):
        read_messages(data)


def test_wrong_requests() -> None:
    with pytest.raises(MessagesError, match=r"key 'response_format', expected an array of messages, or"):
        read_messages({"messages": [user("p")], "response_format": {}})
    with pytest.raises(MessagesError, match=r"messages\[0\].tools and the request's tools are both given"):
        read_messages({"messages": [system("", tools=[TOOL])], "tools": [TOOL]})
    with pytest.raises(MessagesError, match=r"messages\[0\].role is 'user', expected system, to declare the request"):
        read_messages({"messages": [user("p"), system("")], "tools": [TOOL]})
    with pytest.raises(MessagesError, match=r"the request.tools\[0\].function is missing"):
        read_messages({"messages": [user("p")], "tools": [FUNCTION]})


def test_a_task_that_would_be_lost() -> None:
    assert "messages[1].task is query, but the message joins messages[0]" in refusal(user("p"), user("q", task="query"))
    assert "where the released encoder drops it" in refusal(result("r"), user("q", task="action"))


# Segments.


def test_parts_and_control_tokens() -> None:
    messages = [
        system("s", tools=[TOOL]),
        user("a</think>b"),
        assistant("c<think>", "r", tool_calls=[call('{"a": "<｜User｜>"}')]),
        result("o"),
    ]
    prompt = encode(read_messages(messages), EncodeOptions(thinking=True))
    assert "".join(prompt.text[start:stop] for start, stop in prompt.control_ranges) == "".join(
        segment.text for segment in prompt.segments if segment.is_control
    )
    assert prompt.spelled_tokens == [(1, "</think>"), (2, "<think>"), (2, "<｜User｜>")]
    by_part = {part: "".join(s.text for s in prompt.segments if s.part is part) for part in Part}
    assert by_part[Part.SYSTEM] == "s"
    assert by_part[Part.TOOLS] == TOOLS
    assert by_part[Part.USER] == f"{U}a</think>b{U}", "the turn of the tool result is opened by it"
    assert by_part[Part.TOOL_RESULT] == "<tool_result>o</tool_result>"
    assert by_part[Part.REASONING] == "r</think>"
    assert by_part[Part.CONTENT] == "c<think>"
    assert by_part[Part.TOOL_CALLS] == calls(invoke(("a", "true", "<｜User｜>")))
    assert by_part[Part.HEADER] == f"{A}<think>" * 2
    assert {s.message for s in prompt.segments if s.part is Part.TOOL_RESULT} == {3}
    dsml = [s for s in prompt.segments if s.text == "｜DSML｜" and s.part is Part.TOOL_CALLS]
    assert len(dsml) == 6
    assert all(segment.is_control for segment in dsml)
