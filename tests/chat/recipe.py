"""Conversations in the types of deepseek-recipe, DeepSeek's own encoder."""

from typing import Any

import pytest

recipe = pytest.importorskip("deepseek_recipe", reason="deepseek-recipe has wheels for x86-64 only")


def recipe_conversation(messages: list[dict[str, Any]], *, thinking: bool, effort: str | None) -> Any:
    """Our messages as a recipe Conversation; tools are those that a system message declares."""
    tools = [
        recipe.ToolDefinition(
            tool["function"]["name"], tool["function"].get("description"), tool["function"].get("parameters")
        )
        for message in messages
        for tool in message.get("tools", ())
    ]
    return recipe.Conversation(
        [_message(message) for message in messages],
        thinking_mode=thinking,
        tools=tools or None,
        reasoning_effort=effort,
    )


def _message(message: dict[str, Any]) -> Any:
    content = message.get("content", "")
    role = message["role"]
    if role == "system":
        return recipe.SystemMessage(content)
    if role == "user":
        return recipe.UserMessage(content)
    if role == "latest_reminder":
        return recipe.LatestReminderMessage(content)
    if role == "tool":
        return recipe.ToolMessage(content, message.get("tool_call_id"))
    calls = [
        recipe.ToolCall(call.get("id", ""), call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls", ())
    ]
    return recipe.AssistantMessage(content, message.get("reasoning_content"), calls or None)
