"""Answers as they come: no half characters, the text of all tokens, and the message that they make."""

import random
from typing import Any

import pytest

from tests.chat.tokenizer_file import v4_tokenizer
from v4quant.chat import Answer, EncodeOptions, encode, read_messages
from v4quant.chat.tokens import EOS, IDS, THINK
from v4quant.errors import CompletionError, MessagesError

USER = {"role": "user", "content": "Weather in Oslo?"}
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">x'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def answer_to(*messages: dict[str, Any], thinking: bool = False) -> Answer:
    prompt = encode(read_messages(list(messages)), EncodeOptions(thinking))
    return Answer(v4_tokenizer().encode(prompt), v4_tokenizer())


def ids_of(text: str) -> list[int]:
    """Of an answer's text, in which what is spelled like a control token is one."""
    from v4quant.chat.segments import Part, PromptBuilder

    builder = PromptBuilder()
    builder.fixed(text, Part.CONTENT, 0)
    return v4_tokenizer().encode(builder.prompt()).ids


def told(answer: Answer, ids: list[int]) -> list[str]:
    """The pieces of text that come with each token, and at the end."""
    return [*(answer.add(own) for own in ids), answer.rest()]


def test_the_pieces_are_the_text_whatever_the_tokens() -> None:
    """Random tokens: half characters, bytes that are none, control tokens."""
    draw = random.Random(8)
    single = [own for own in range(300) if own not in (0, 1)]  # most single bytes are here
    for _ in range(300):
        ids = [
            draw.choice([draw.randrange(129_280), draw.choice(single), IDS[THINK]]) for _ in range(draw.randrange(12))
        ]
        answer = answer_to(USER)
        expected = "".join(text for text, _ in v4_tokenizer().segments(ids))
        assert "".join(told(answer, ids)) == expected == answer.text
        assert answer.ids == ids


def test_a_character_of_several_tokens_comes_whole() -> None:
    text = "𓀀 ok"
    ids = ids_of(text)
    assert len(ids) > 3
    pieces = told(answer_to(USER), ids)
    assert pieces[:2] == ["", ""] and "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end() -> None:
    pieces = told(answer_to(USER), ids_of("𓀀")[:2])
    assert pieces == ["", "", "\ufffd"]


def test_messages() -> None:
    answer = answer_to(USER, thinking=True)
    told(answer, ids_of(f"why</think>so{CALL}{EOS}"))
    found = answer.message()
    assert (found.reasoning, found.content) == ("why", "so")
    assert [(call.name, call.arguments) for call in found.tool_calls] == [("f", '{"a": "x"}')]
    plain = answer_to(USER)
    told(plain, ids_of(f"so{EOS}"))
    assert (plain.message().reasoning, plain.message().content) == ("", "so")
    cut = answer_to(USER)
    told(cut, ids_of("so"))
    with pytest.raises(CompletionError, match="it was cut off"):
        cut.message()


def test_a_prefix_belongs_to_the_message() -> None:
    begun = {"role": "assistant", "content": "It is", "reasoning_content": "hm", "wo_eos": True}
    answer = answer_to(USER, begun, thinking=True)
    told(answer, ids_of(f" cold{EOS}"))
    assert (answer.message().reasoning, answer.message().content) == ("hm", "It is cold")
    assert answer.text == f" cold{EOS}", "what the model wrote, and no more"


@pytest.mark.parametrize("task", ["action", "title"])
def test_tasks(task: str) -> None:
    answer = answer_to(USER | {"task": task})
    told(answer, ids_of(f"Search{EOS}"))
    assert answer.message().content == "Search"


@pytest.mark.parametrize(
    ("messages", "part"),
    [
        ([USER, {"role": "assistant", "content": "c"}], "eos"),
        ([{"role": "system", "content": "s"}], "system"),
        ([USER, {"role": "latest_reminder", "content": "now"}], "latest_reminder"),
        ([{"role": "system", "content": ""}], "bos"),
    ],
)
def test_nothing_to_answer(messages: list[dict[str, Any]], part: str) -> None:
    with pytest.raises(MessagesError, match=f"the conversation ends in {part}, expected something to answer"):
        answer_to(*messages)
