"""Options that several commands share, declared once, and the sizes that people type."""

import re
from pathlib import Path
from typing import Annotated

import typer

from v4quant.errors import UsageError

Source = Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint folder.", show_default=False)]
AnySource = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Checkpoint folder, REPO_ID on the Hub, or hf://REPO_ID@REVISION.", show_default=False
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; made if missing.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint that OUT holds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")]
JsonMode = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
MaxWorkers = Annotated[int, typer.Option(metavar="N", help="Threads; memory grows with them.", min=1, max=256)]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))? ?([A-Z]+)")


def parse_size(text: str, option: str) -> int:
    """Read a decimal size with its unit, "5GB", in bytes.

    Args:
        text: what the user typed.
        option: the option's name, for the error.

    Raises:
        UsageError: if the unit is missing or unknown, or the size is zero.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None or match[3] not in _UNITS:
        raise UsageError(f"{option} is {text!r}, expected a size with a unit", hint=f"For example: {option} 5GB")
    fraction = match[2] or ""
    size: int = int(match[1] + fraction) * _UNITS[match[3]] // 10 ** len(fraction)
    if size == 0:
        raise UsageError(f"{option} is {text!r}, expected more than nothing", hint=f"For example: {option} 5GB")
    return size
