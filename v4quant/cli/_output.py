"""What a command says: results on stdout (text, or exactly one JSON object), everything else on stderr."""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any


def escaped(text: str) -> str:
    """Make control characters visible, so that a hostile tensor or file name cannot steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Output:
    """The one place that prints.

    Args:
        json_mode: True makes `result` print its JSON object and silences `line`.
    """

    def __init__(self, json_mode: bool) -> None:
        self.json_mode = json_mode

    def line(self, text: str = "") -> None:
        """Print a line of human-readable result on stdout."""
        if not self.json_mode:
            print(escaped(text))

    def result(self, values: Mapping[str, Any]) -> None:
        """Print the command's JSON object, under --json."""
        if self.json_mode:
            print(json.dumps(_json(values), indent=2, allow_nan=False))

    def note(self, text: str) -> None:
        """Print a remark or the next command to run, on stderr."""
        print(escaped(text), file=sys.stderr)


def _json(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _json(own) for key, own in value.items()}
    return [_json(own) for own in value] if isinstance(value, list | tuple) else value


def decimal_bytes(count: int) -> str:
    """Write a byte count as people do: decimal units, three significant digits or more."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def plural(count: int, noun: str) -> str:
    """Write "1 tensor", "2 tensors", "3 mismatches"."""
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{ending}"
