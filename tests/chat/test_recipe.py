"""Against deepseek-recipe, DeepSeek's own encoder: the same text, the same control tokens, the same ids.

Where it differs, DeepSeek's Python encoders, whose rules v4quant follows, do as v4quant does. Each difference has a
test.
"""

import random
from functools import cache
from typing import Any

import pytest

from tests.chat import conversations
from tests.chat.recipe import recipe, recipe_conversation
from tests.chat.test_encode import TEXT_A, TOOL, A, B, E, U, assistant, call, chat, result, system, think, user
from tests.chat.tokenizer_file import tokenizer_path, v4_tokenizer
from v4quant.chat import EncodeOptions, encode, read_messages

COUNT = 2_000
BATCH = 100


def render(*messages: dict[str, Any], thinking: bool = False, effort: str | None = "low") -> str:
    prompt: str = (
        recipe.DeepseekV4Encoding()
        .render_conversation(recipe_conversation(list(messages), thinking=thinking, effort=effort))
        .prompt
    )
    return prompt


def drawn(seed: int) -> tuple[list[dict[str, Any]], bool, str]:
    """A conversation, whether the model thinks, and an effort; half of them spell control tokens in their texts."""
    rng = random.Random(seed)
    thinking = rng.random() < 0.7
    messages = conversations.conversation(rng, thinking=thinking, spelled=seed % 2 == 0)
    return messages, thinking, rng.choice(["low", "high", "max"])


@pytest.mark.parametrize("batch", range(COUNT // BATCH))
def test_random_conversations(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        messages, thinking, effort = drawn(seed)
        expected = recipe.DeepseekV4Encoding().render_conversation(
            recipe_conversation(messages, thinking=thinking, effort=effort)
        )
        found = encode(read_messages(messages), EncodeOptions(thinking, effort))
        assert found.text == expected.prompt, seed
        assert found.control_ranges == expected.special_ranges, seed


def test_what_was_drawn_has_everything() -> None:
    conversations_ = [drawn(seed)[0] for seed in range(COUNT)]
    roles = [[message["role"] for message in messages] for messages in conversations_]
    assert sum("tool" in of for of in roles) > 500
    assert sum("latest_reminder" in of for of in roles) > 50
    assert sum(any(message.get("tools") for message in messages) for messages in conversations_) > 500
    assert sum(of[-1] == "user" for of in roles) > 300
    assert sum(of[-1] == "tool" for of in roles) > 300


@cache
def recipe_encoding() -> Any:
    return recipe.DeepseekV4Encoding().with_tokenizer(recipe.Tokenizer.from_file(str(tokenizer_path())))


@pytest.mark.parametrize("batch", range(10))
def test_random_ids(batch: int) -> None:
    for seed in range(15 * batch, 15 * (batch + 1)):
        messages, thinking, effort = drawn(seed)
        expected = recipe_encoding().encode(recipe_conversation(messages, thinking=thinking, effort=effort))
        found = v4_tokenizer().encode(encode(read_messages(messages), EncodeOptions(thinking, effort)))
        assert found.ids == expected, seed


# Differences.


def test_calls_without_arguments() -> None:
    messages = [user("p"), assistant("", tool_calls=[call("{}")]), result("r")]
    assert 'name="f">\n\n</｜DSML｜invoke>' in chat(*messages)
    assert 'name="f">\n</｜DSML｜invoke>' in render(*messages)


def test_ids_as_text() -> None:
    made = assistant("", tool_calls=[call('{"a": 1}', call_id="c9"), call('{"a": 2}', call_id="c10")])
    ours, theirs = (given(user("p"), made, result("10", "c10"), result("9", "c9")) for given in (chat, render))
    assert ours.index(">1<") < ours.index(">2<")
    assert ours.index("<tool_result>9") < ours.index("<tool_result>10")
    assert theirs.index(">1<") > theirs.index(">2<")
    assert theirs.index("<tool_result>9") > theirs.index("<tool_result>10")


def test_roles_and_tasks_that_it_lacks() -> None:
    assert not hasattr(recipe, "DeveloperMessage")
    assert "Developer" not in dir(recipe.SpecialToken)
    with pytest.raises(TypeError):
        recipe.UserMessage("p", task="query")


def test_a_trailing_answer_is_history() -> None:
    messages = [user("p"), assistant("c")]
    assert chat(*messages) == f"{B}{U}p{A}</think>c{E}"
    assert render(*messages) == f"{B}{U}p{A}</think>c{E}{A}</think>"


def test_what_its_request_conversion_refuses() -> None:
    body = {"model": "DeepSeek-V4-Pro", "messages": [user("p")], "response_format": {"type": "json_object"}}
    options = recipe.ConversionOptions()
    with pytest.raises(recipe.ConversionError):
        recipe.ChatCompletionRequest(body).convert(options)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]
    with pytest.raises(recipe.ConversionError):
        recipe.ChatCompletionRequest({"model": "DeepSeek-V4-Pro", "messages": [user("p")], "tools": tools}).convert(
            options
        )
    assert "### Available Tool Schemas" in chat(system("", tools=tools), user("p"))


def test_no_effort_given() -> None:
    body = {"model": "DeepSeek-V4-Pro", "messages": [user("p")]}
    conversation = recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions()).conversation
    assert recipe.DeepseekV4Encoding().render_conversation(conversation).prompt == f"{B}{TEXT_A}{U}p{A}<think>"
    assert think(user("p")) == f"{B}{U}p{A}<think>"


def test_empty_texts_of_a_user() -> None:
    assert chat(user("p"), user(""), user("q")) == f"{B}{U}p\n\n\n\nq{A}</think>"
    assert render(user("p"), user(""), user("q")) == f"{B}{U}p\n\nq{A}</think>"


def test_small_numbers() -> None:
    messages = [user("p"), assistant("", tool_calls=[call('{"a": 1e-7}')]), result("r")]
    assert ">1e-07<" in chat(*messages)
    assert ">1e-7<" in render(*messages)


def test_a_reminder_after_a_user() -> None:
    messages = [user("p"), {"role": "latest_reminder", "content": "now"}, user("q")]
    assert chat(*messages) == f"{B}{U}p{A}</think><｜latest_reminder｜>now{U}q{A}</think>"
    assert render(*messages) == f"{B}{U}p<｜latest_reminder｜>now{U}q{A}</think>"


def test_missing_reasoning() -> None:
    messages = [system("", tools=[TOOL]), user("p"), assistant("c"), user("q")]
    assert f"{A}<think></think>c" in think(*messages)
    assert f"{A}</think>c" in render(*messages, thinking=True)


def test_reasoning_in_chat_mode() -> None:
    messages = [system("", tools=[TOOL]), user("p"), assistant("c", "r"), user("q")]
    assert f"{A}</think>c" in chat(*messages)
    assert f"{A}<think>r</think>c" in render(*messages)
