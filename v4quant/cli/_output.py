"""What a command says: results on stdout (text, or exactly one JSON object), everything else on stderr."""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from v4quant.words import decimal_bytes, escaped, plural

__all__ = ["Output", "decimal_bytes", "escaped", "plural"]


class Output:
    """The one place that prints.

    Args:
        json_mode: True makes `result` print its JSON object and silences `line`.
        silent: print nothing at all, in a process that works for another one, which speaks.
    """

    def __init__(self, json_mode: bool, *, silent: bool = False) -> None:
        self.json_mode = json_mode
        self._is_silent = silent

    def line(self, text: str = "") -> None:
        """Print a line of human-readable result on stdout."""
        if not self.json_mode and not self._is_silent:
            print(escaped(text))

    def piece(self, text: str) -> None:
        """Print a piece of human-readable result at once, without ending its line."""
        if not self.json_mode:
            print(escaped(text), end="", flush=True)

    def result(self, values: Mapping[str, Any]) -> None:
        """Print the command's JSON object, under --json."""
        if self.json_mode and not self._is_silent:
            print(json.dumps(_json(values), indent=2, allow_nan=False))

    def note(self, text: str) -> None:
        """Print a remark or the next command to run, on stderr."""
        if not self._is_silent:
            print(escaped(text), file=sys.stderr)


def _json(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _json(own) for key, own in value.items()}
    return [_json(own) for own in value] if isinstance(value, list | tuple) else value


def is_finite(value: Any) -> bool:
    """True if no number in nested values is NaN or infinite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(is_finite(own) for own in value.values())
    return all(is_finite(own) for own in value) if isinstance(value, list | tuple) else True
