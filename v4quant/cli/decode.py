"""`v4quant decode`: what the model wrote, as a message."""

from pathlib import Path
from typing import Annotated

import typer

from v4quant.cli._chat import MAX_TEXT_BYTES, Thinking, TokenizerSource, load_tokenizer, read_json
from v4quant.cli._files import read_text
from v4quant.cli._options import JsonMode
from v4quant.cli._output import Output
from v4quant.errors import CompletionError, UsageError


def decode(
    completion: Annotated[
        Path,
        typer.Argument(
            metavar="COMPLETION",
            help="What the model wrote after the prompt: text, or with --tokenizer a JSON array of ids.",
            show_default=False,
        ),
    ],
    tokenizer: TokenizerSource = None,
    thinking: Thinking = False,
    json_mode: JsonMode = False,
) -> None:
    """Parse a completion into an assistant message: reasoning, content and tool calls.

    \b
    v4quant decode completion.txt --thinking --json
    v4quant decode ids.json --tokenizer DeepSeek-V4-Flash
    """
    from v4quant.chat import parse_completion, parse_segments

    output = Output(json_mode)
    try:
        if tokenizer is None:
            text = read_text(completion, MAX_TEXT_BYTES, "a completion's text")
            found = parse_completion(_without_last_newline(text), thinking=thinking)
        else:
            found = parse_segments(load_tokenizer(tokenizer).segments(_read_ids(completion)), thinking=thinking)
    except CompletionError as error:
        hint = "" if thinking else "A completion that begins with reasoning needs --thinking."
        raise CompletionError(f"{completion}: {error}", hint=error.hint or hint) from None
    output.result(found.to_json())
    if thinking:
        output.line(f"reasoning: {found.reasoning}")
    output.line(f"content: {found.content}")
    for call in found.tool_calls:
        output.line(f"call: {call.name} {call.arguments}")


def _without_last_newline(text: str) -> str:
    """Editors end files with a new line; after a completion's end nothing is allowed, so one there is the editor's."""
    from v4quant.chat.dsml import CALLS_END
    from v4quant.chat.tokens import EOS

    without = text.removesuffix("\n").removesuffix("\r")
    return without if without.endswith((EOS, CALLS_END)) else text


def _read_ids(path: Path) -> list[int]:
    data = read_json(path, "a JSON array of token ids")
    if not isinstance(data, list) or any(type(own) is not int for own in data):
        raise UsageError(f"{path}: expected a JSON array of token ids", hint="For example: [19923, 1]")
    return data
