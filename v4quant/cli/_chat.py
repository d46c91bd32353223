"""What `encode`, `decode` and `generate` share: options, reading messages, and the tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v4quant import strict_json
from v4quant.chat.texts import Encoder
from v4quant.cli._files import read_file, read_text
from v4quant.errors import CheckpointError, MessagesError, UsageError

if TYPE_CHECKING:
    from v4quant.chat.encode import EncodeOptions
    from v4quant.chat.segments import Prompt
    from v4quant.chat.tokenizer import Tokenizer

MAX_TEXT_BYTES = 2**28
TOKENIZER_NAME = "tokenizer.json"

Messages = Annotated[
    Path,
    typer.Argument(metavar="MESSAGES", help="JSON array of messages, as in OpenAI's chat API.", show_default=False),
]
TokenizerSource = Annotated[
    Path | None,
    typer.Option(metavar="SRC", help="Checkpoint folder, or its tokenizer.json: token ids in place of text."),
]
Thinking = Annotated[bool, typer.Option("--thinking", help="The model thinks before it answers.")]
Effort = Annotated[str | None, typer.Option(metavar="LEVEL", help="Reasoning effort: low, high or max. [says nothing]")]
EncoderChoice = Annotated[
    Encoder, typer.Option(help="preview: V4-Flash and V4-Pro of April 2026. later: 0731 and 0813.")
]
KeepReasoning = Annotated[
    bool, typer.Option("--keep-reasoning", help="Keep the reasoning of earlier turns, even without tools.")
]


def read_json(path: Path, expected: str) -> Any:
    """Read a JSON file.

    Raises:
        UsageError: if it cannot be read or is no JSON.
    """
    try:
        return strict_json.parse(read_text(path, MAX_TEXT_BYTES, expected).removeprefix("\ufeff"))
    except ValueError as error:
        raise UsageError(f"{path}: is not valid JSON: {error}", hint=f"Expected {expected}.") from None


def read_prompt(path: Path, options: "EncodeOptions") -> "Prompt":
    """Read messages and encode them.

    Raises:
        UsageError: if the file cannot be read, or its messages have no form in the prompt; names the file.
    """
    from v4quant.chat import encode, read_messages

    data = read_json(path, "messages")
    try:
        return encode(read_messages(data), options)
    except MessagesError as error:
        raise MessagesError(f"{path}: {error}", hint=error.hint) from None


def load_tokenizer(source: Path) -> "Tokenizer":
    """Read a checkpoint's tokenizer.

    Raises:
        CheckpointError: if there is none, or it is not V4's.
    """
    from v4quant.chat.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer

    path = source / TOKENIZER_NAME if source.suffix != ".json" else source
    return Tokenizer(read_file(path, MAX_TOKENIZER_BYTES, "a tokenizer.json", CheckpointError), str(path))
