"""What `encode` and `decode` share: options, and the tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v4quant import strict_json
from v4quant.cli._files import read_file, read_text
from v4quant.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from v4quant.chat.tokenizer import Tokenizer

MAX_TEXT_BYTES = 2**28
_TOKENIZER = "tokenizer.json"

TokenizerSource = Annotated[
    Path | None,
    typer.Option(metavar="SRC", help="Checkpoint folder, or its tokenizer.json: token ids in place of text."),
]
Thinking = Annotated[bool, typer.Option("--thinking", help="The model thinks before it answers.")]


def read_json(path: Path, expected: str) -> Any:
    """Read a JSON file.

    Raises:
        UsageError: if it cannot be read or is no JSON.
    """
    try:
        return strict_json.parse(read_text(path, MAX_TEXT_BYTES, expected).removeprefix("\ufeff"))
    except ValueError as error:
        raise UsageError(f"{path}: is not valid JSON: {error}", hint=f"Expected {expected}.") from None


def load_tokenizer(source: Path) -> "Tokenizer":
    """Read a checkpoint's tokenizer.

    Raises:
        CheckpointError: if there is none, or it is not V4's.
    """
    from v4quant.chat.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer

    path = source / _TOKENIZER if source.suffix != ".json" else source
    return Tokenizer(read_file(path, MAX_TOKENIZER_BYTES, "a tokenizer.json", CheckpointError), str(path))
