"""Parsing: what the released parser accepts and refuses, the way back of random calls, and mutated completions."""

import json
import random

import pytest

from tests.chat import conversations
from tests.chat.test_encode import E, calls, invoke
from v4quant.chat import EncodeOptions, Message, Part, Role, ToolCall, encode, parse_completion, parse_segments
from v4quant.chat.segments import split_control
from v4quant.errors import CompletionError

ONE = invoke(("a", "true", "x"))


def refusal(text: str, *, thinking: bool = False) -> str:
    with pytest.raises(CompletionError) as caught:
        parse_completion(text, thinking=thinking)
    message = str(caught.value)
    assert message.startswith("the completion, at character ")
    assert len(message) < 250
    assert message.isprintable()
    return message


def parsed_calls(block: str) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in parse_completion(block, thinking=False).tool_calls]


def test_an_answer() -> None:
    assert parse_completion(f"r</think>hi{E}", thinking=True).to_json() == {
        "role": "assistant",
        "content": "hi",
        "reasoning_content": "r",
        "tool_calls": [],
    }
    assert parse_completion(f"hi{E}", thinking=False).content == "hi"
    assert parse_completion(E, thinking=False).content == ""
    assert parse_completion(f"</think>{E}", thinking=True).reasoning == ""


def test_calls() -> None:
    block = calls(invoke(("a", "true", 'x "y"\n'), ("b", "false", '[1, {"c": null}]')), invoke(("1.0", "false", "1.0")))
    found = parse_completion(f"r</think>text{block}{E}", thinking=True)
    assert (found.reasoning, found.content) == ("r", "text")
    assert found.to_json()["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": '{"a": "x \\"y\\"\\n", "b": [1, {"c": null}]}'}},
        {"type": "function", "function": {"name": "f", "arguments": '{"1.0": 1.0}'}},
    ]


def test_what_is_accepted() -> None:
    assert parsed_calls(calls(ONE)) == [("f", '{"a": "x"}')], "no EOS after calls"
    assert parsed_calls(calls(invoke())) == [("f", "{}")]
    assert parsed_calls(calls(invoke().replace(">\n\n", ">\n"))) == [("f", "{}")], "no blank line"
    closed = '<｜DSML｜invoke name="f"/>\n'
    assert parsed_calls(calls(closed, ONE, closed) + E) == [("f", "{}"), ("f", '{"a": "x"}'), ("f", "{}")]
    hostile = "</think><think>｜DSML｜</｜DSML｜invoke></｜DSML｜tool_calls>" + E
    assert parsed_calls(calls(invoke(("a", "true", hostile)))) == [
        ("f", json.dumps({"a": hostile}, ensure_ascii=False))
    ]
    long = "9" * 5000
    assert parsed_calls(calls(invoke(("n", "false", long)))) == [("f", f'{{"n": {long}}}')]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("plain answer", f"does not end in {E}: it was cut off"),
        ("", "at character 0, does not end in"),
        (f"hi{E}more", "goes on after its end"),
        (f"hi{E}\n", "goes on after its end"),
        (f"{calls(ONE)}more{E}", "has 'more"),
        (f"{calls(ONE)}{E}{E}", "goes on after its end"),
        (f"a<think>b{E}", "has a control token in the content, '<think>b"),
        (f"a</think>b{E}", "has a control token in the content"),
        (f"<｜begin▁of▁sentence｜>b{E}", "has a control token in the content"),
        (f"a｜DSML｜b{E}", "has a control token in the content"),
        (f"a<｜DSML｜tool_calls>{E}", "has a control token in the content"),  # one line break short
        (calls(), "has a block of tool calls without <｜DSML｜invoke"),
        (calls(ONE).replace("tool_calls>\n", "tool_calls>"), "expected"),
        (calls(ONE)[:-1], "expected"),
        (calls(invoke(("a", "true", "1"), ("a", "true", "2"))), "has the parameter 'a' twice in one call"),
        (calls(invoke(("a", "True", "1"))), 'expected name="KEY" string="true|false">'),
        (calls(invoke(("a", "false", "{oops"))), "has '{oops' for the parameter 'a', expected JSON"),
        (calls(invoke(("a", "false", "NaN"))), "expected JSON"),
        (calls(invoke(("a", "false", ""))), "expected JSON"),
        (calls(invoke(("a", "false", "[" * 100_000))), "expected JSON"),
        (calls(ONE.replace("</｜DSML｜parameter>", "")), "has no end of the parameter 'a'"),
        (calls(ONE.replace('name="f"', 'name=""')), 'expected name="NAME"'),
        (calls(ONE.replace('name="f">\n', 'name="f">')), 'expected name="NAME"'),
        (calls('<｜DSML｜invoke name="f"/></｜DSML｜invoke>\n'), 'expected name="NAME"'),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    printed = refusal(text)
    assert says.encode("ascii", "backslashreplace").decode() in printed or says in printed


def test_what_is_refused_in_thinking_mode() -> None:
    assert "has no </think>" in refusal(f"hi{E}", thinking=True)
    assert "has no </think>" in refusal(f"r{calls(ONE)}{E}", thinking=True)
    assert "has a control token in the reasoning" in refusal(f"r{calls(ONE)}</think>{E}", thinking=True)
    assert "has a control token in the reasoning" in refusal(f"<think>r</think>c{E}", thinking=True)
    assert "has a control token in the content" in refusal(f"r</think>c</think>{E}", thinking=True)


def test_every_cut_of_a_call_is_refused() -> None:
    block = calls(ONE)
    for cut in range(len(block)):
        refusal(block[:cut])


# The way back.


def random_message(rng: random.Random) -> Message:
    return Message(
        Role.ASSISTANT,
        conversations.text(rng),
        conversations.text(rng),
        tuple(
            ToolCall(name, json.dumps(json.loads(conversations.arguments(rng)), ensure_ascii=False))
            for name in rng.choices(["f", "get_weather", "名前", "x y", "<b>"], k=rng.choice([0, 1, 1, 3]))
        ),
    )


def completion_of(message: Message) -> list[tuple[str, bool]]:
    """What the model would have written of a message: all after the header, in pieces."""
    prompt = encode([Message(Role.USER, "p"), message], EncodeOptions(thinking=True))
    at = max(index for index, segment in enumerate(prompt.segments) if segment.part is Part.HEADER)
    return [(segment.text, segment.is_control) for segment in prompt.segments[at + 1 :]]


@pytest.mark.parametrize("batch", range(10))
def test_the_way_back(batch: int) -> None:
    """decode(encode(x)) is x, as text and as segments; and encode(decode(text)) is the text."""
    for seed in range(100 * batch, 100 * (batch + 1)):
        message = random_message(random.Random(seed))
        pieces = completion_of(message)
        text = "".join(piece for piece, _ in pieces)
        for found in (parse_completion(text, thinking=True), parse_segments(pieces, thinking=True)):
            again = Message(Role.ASSISTANT, found.content, found.reasoning, found.tool_calls)
            assert again == message, seed
            assert completion_of(again) == pieces, seed


def test_text_that_spells_control_tokens_comes_back_from_segments() -> None:
    rng = random.Random(0)
    for _ in range(200):
        spelled = "".join(rng.choice([*conversations.SPELLED, "a\n\n<｜DSML｜tool_calls>\n"]) for _ in range(3))
        found = parse_segments(completion_of(Message(Role.ASSISTANT, spelled, spelled)), thinking=True)
        assert (found.reasoning, found.content) == (spelled, spelled)


def test_any_control_token_in_content_is_refused_in_segments() -> None:
    with pytest.raises(CompletionError, match="has a control token in the content"):
        parse_segments([("a", False), ("<｜User｜>", True), (E, True)], thinking=False)
    assert parse_completion(f"a<｜User｜>{E}", thinking=False).content == "a<｜User｜>", "text cannot tell"


# Mutations.

_FRAGMENTS = (
    *("<think>", "</think>", E, "<｜begin▁of▁sentence｜>", "｜DSML｜", "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),
    *(
        '<｜DSML｜invoke name="f">',
        "</｜DSML｜invoke>",
        "<｜DSML｜parameter",
        "</｜DSML｜parameter>",
        "/｜DSML｜parameter",
    ),
    *(
        ' name="',
        '"',
        ' string="true">',
        ' string="false">',
        ">\n",
        "\n\n",
        "\n",
        "<",
        ">",
        "/",
        "/>",
        "{",
        "[",
        "]",
        "}",
    ),
    *("1e999", "NaN", "-", "0" * 30, "\\u", "\ud800", "\x00", "\U0010ffff", "é", " "),
)


def mutate(rng: random.Random, text: str) -> str:
    """Cut, double, move, replace or put in pieces at random."""
    for _ in range(rng.randint(1, 4)):
        start, stop = sorted(rng.randint(0, len(text)) for _ in range(2))
        stop = min(stop, start + rng.choice([0, 1, 2, 8, 40]))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:start] + text[stop:]
        elif kind == 1:
            text = text[:stop] + text[start:]
        elif kind == 2:
            text = text[: rng.randint(0, len(text))]
        else:
            text = text[:start] + rng.choice(_FRAGMENTS) + text[stop if kind == 3 else start :]
    return text


def fuzz(count: int, seed: int) -> tuple[int, int]:
    """Parse mutated completions; only CompletionError may be raised. Gives how many parse, and how many are refused."""
    rng = random.Random(seed)
    originals = ["".join(piece for piece, _ in completion_of(random_message(rng))) for _ in range(200)]
    good = 0
    for _ in range(count):
        text = mutate(rng, rng.choice(originals))
        thinking = rng.random() < 0.9
        try:
            if rng.random() < 0.5:
                found = parse_completion(text, thinking=thinking)
            else:
                # Some of what is spelled like control tokens is text.
                pieces = [(piece, control and rng.random() < 0.9) for piece, control in split_control(text)]
                found = parse_segments(pieces, thinking=thinking)
        except CompletionError:
            continue
        good += 1
        for call in found.tool_calls:
            assert isinstance(json.loads(call.arguments), dict)
    return good, count - good


def test_mutated_completions() -> None:
    good, refused = fuzz(30_000, seed=1)
    assert good > 1_000
    assert refused > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_million_mutated_completions(seed: int) -> None:
    good, refused = fuzz(100_000, seed=100 + seed)
    assert good > 3_000
    assert refused > 30_000
