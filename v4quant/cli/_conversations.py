"""Conversations for `v4quant parity --messages`: read and encoded for parity, and what came of them in words."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4quant import strict_json
from v4quant.cli._chat import MAX_TEXT_BYTES, TOKENIZER_NAME
from v4quant.cli._files import read_text
from v4quant.cli._output import Output, plural
from v4quant.cli._progress import layer_progress
from v4quant.errors import CheckpointError, CompletionError, MessagesError, UsageError

if TYPE_CHECKING:
    from v4quant.chat import EncodeOptions, Message, Tokenizer
    from v4quant.checkpoint.files import Source
    from v4quant.parity.compare import Task
    from v4quant.parity.conversations import Conversation, Opening, Stretch

_SHOWN = 5


def read_conversations(path: Path, files: "Source", *, thinking: bool) -> "list[Conversation]":
    """Read and encode a file of conversations.

    Args:
        path: one conversation a line, as `v4quant encode` takes it.
        files: of the checkpoint whose tokenizer is taken.
        thinking: whether the model thinks; if not, reasoning is left out, and a note on stderr says so.

    Raises:
        UsageError: if the file cannot be read, or a line is no conversation; names the line.
        CheckpointError: if the checkpoint has no tokenizer, or it is not V4's.
    """
    from v4quant.chat import EncodeOptions, Tokenizer, read_messages

    if TOKENIZER_NAME not in files:
        raise CheckpointError(
            f"{files.where}: has no {TOKENIZER_NAME}, which --messages needs",
            hint="Copy it from the release, or give token ids: --tokens FILE",
        )
    tokenizer = Tokenizer(files.read(TOKENIZER_NAME), f"{files.where}/{TOKENIZER_NAME}")
    options, found, reasons = EncodeOptions(thinking), [], False
    text = read_text(path, MAX_TEXT_BYTES, "conversations, one JSON array of messages a line")
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            messages = read_messages(strict_json.parse(line))
            found.append(_encode(f"line {number}", messages, options, tokenizer))
        except ValueError as error:
            raise UsageError(f"{path} line {number}: is not valid JSON: {error}") from None
        except MessagesError as error:
            raise MessagesError(f"{path} line {number}: {error}", hint=error.hint) from None
        reasons = reasons or any(message.reasoning for message in messages)
    if reasons and not thinking:
        Output(json_mode=False).note(f"{path}: holds reasoning, which is left out; to keep it: --thinking")
    return found


def _encode(
    name: str, messages: "Sequence[Message]", options: "EncodeOptions", tokenizer: "Tokenizer"
) -> "Conversation":
    from v4quant.chat import Part, encode
    from v4quant.parity.conversations import Conversation

    encoded = tokenizer.encode(encode(messages, options))

    def stretches(*parts: Part) -> "tuple[Stretch, ...]":
        return tuple((span.start, span.stop) for span in encoded.spans if span.part in parts)

    return Conversation(
        name=name,
        ids=tuple(encoded.ids),
        assistant=stretches(Part.REASONING, Part.CONTENT, Part.TOOL_CALLS, Part.EOS),
        tool_calls=stretches(Part.TOOL_CALLS),
        opening=_opening(messages, options, tokenizer),
    )


def _opening(messages: "Sequence[Message]", options: "EncodeOptions", tokenizer: "Tokenizer") -> "Opening | None":
    """The conversation without the assistant's messages at its end, to be answered anew; None if none asks for it."""
    from v4quant.chat import Answer, Role, encode
    from v4quant.parity.conversations import Call, Opening, Said

    asked = len(messages)
    while asked and messages[asked - 1].role is Role.ASSISTANT:
        asked -= 1
    encoded = tokenizer.encode(encode(messages[:asked], options))
    try:
        Answer(encoded, tokenizer)
    except MessagesError:
        return None

    def read(ids: Sequence[int]) -> Said:
        answer = Answer(encoded, tokenizer)
        answer.ids += ids
        try:
            calls = tuple(Call(call.name, call.arguments) for call in answer.message().tool_calls)
        except CompletionError as error:
            return Said(answer.text, None, str(error))
        return Said(answer.text, calls, "")

    return Opening(tuple(encoded.ids), read)


def write_answers(task: "Task", max_tokens: int) -> dict[str, Any]:
    """Let both models answer the conversations, if they fit into memory; the `continuations` of the result.

    Raises:
        CheckpointError: if weights are missing or damaged.
    """
    from v4quant.chat.tokens import EOS, IDS
    from v4quant.parity.continuations import continuations_json, continue_all, reason_to_skip, skipped_json

    openings = sum(own.opening is not None for own in task.prompts.conversations)
    reason = "none were asked for" if max_tokens == 0 else "" if openings else "no conversation asks for an answer"
    reason = reason or reason_to_skip(task, max_tokens)
    if reason:
        return skipped_json(reason, max_tokens)
    with layer_progress(2 * openings, "answers", unit="answer") as done:
        return continuations_json(task, continue_all(task, max_tokens, IDS[EOS], done), max_tokens)


def print_conversations(output: Output, found: dict[str, Any]) -> None:
    """What came of conversations, for people."""
    for key, name in (("assistant", "assistant"), ("tool_calls", "tool calls")):
        own = found[key]
        if own is None:
            output.line(f"  {name}: none in these conversations")
            continue
        noise = own["noise"]
        output.line(
            f"  {name}, {plural(own['tokens'], 'token')}: KL mean {own['kl_mean']:.3g} (noise {noise['kl_mean']:.3g}), "
            f"max {own['kl_max']:.3g} ({noise['kl_max']:.3g}), top-1 {own['top1']:.4f} ({noise['top1']:.4f})"
        )
    answers = found["continuations"]
    if answers["skipped"] is not None:
        output.line(f"  greedy answers: skipped, as {answers['skipped']}")
        return
    calls = ", ".join(f"{verdict} {count}" for verdict, count in answers["calls"].items() if count)
    output.line(
        f"  greedy answers of up to {plural(answers['max_tokens'], 'token')}: {answers['alike']:,} of "
        f"{answers['written']:,} alike; tool calls: {calls}"
    )
    apart = [own for own in answers["each"] if own["parts_at"] is not None]
    for own in apart[:_SHOWN]:
        preferred = (
            "" if own["margin"] is None else f", where the reference prefers its own by {own['margin']:.3g} nats"
        )
        output.line(f"    {own['name']}: they part at token {own['parts_at']}{preferred}; tool calls: {own['calls']}")
    if len(apart) > _SHOWN:
        output.line(f"    ... and {len(apart) - _SHOWN:,} more (all of them: --json)")
