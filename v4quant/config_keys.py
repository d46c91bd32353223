"""Values of a config.json read as hostile input: one method a kind of value, and the error that names the key."""

import json
from collections.abc import Container
from typing import Any, NoReturn

from v4quant.errors import UsageError

HINT_RELEASE = "Use the config.json of the release that these weights came from, unchanged."


class Keys:
    """The keys of one JSON object, read with their type and range checked.

    Args:
        data: the object.
        where: what to call the file in errors.
        path: what to put before a key in errors: "" or "quantization_config.".
    """

    def __init__(self, data: object, where: str, path: str = "") -> None:
        self.where = where
        self.path = path
        if not isinstance(data, dict):
            name = path.rstrip(".") or "the file"
            raise UsageError(f"{where}: {name} is {show(data)}, expected a JSON object", hint=HINT_RELEASE)
        self.data: dict[str, Any] = data

    def get(self, key: str) -> Any:
        """The value, None where the key is absent or null."""
        return self.data.get(key)

    def wrong(self, key: str, expected: str, hint: str = HINT_RELEASE) -> NoReturn:
        """Raise the error for a key."""
        found = f"is {show(self.data[key])}" if key in self.data else "is missing"
        raise UsageError(f"{self.where}: {self.path}{key} {found}, expected {expected}", hint=hint)

    def integer(self, key: str, smallest: int, largest: int) -> int:
        """A required integer within bounds; true, 4096.0 and "4096" are none."""
        value = self.get(key)
        if type(value) is not int or not smallest <= value <= largest:
            bounds = str(smallest) if smallest == largest else f"an integer from {smallest:,} to {largest:,}"
            self.wrong(key, bounds)
        return value

    def number(self, key: str) -> float:
        """A required positive finite number."""
        value = self.get(key)
        # The upper bound also keeps float() from overflowing.
        if type(value) not in (int, float) or not 0 < value < 1e30:
            self.wrong(key, "a positive number")
        return float(value)

    def integers(self, key: str, allowed: Container[int], expected: str) -> tuple[int, ...]:
        """A required array of allowed integers; `expected` says in words what one may be."""
        value = self.get(key)
        if not isinstance(value, list):
            self.wrong(key, f"an array, each element {expected}")
        for position, element in enumerate(value):
            if type(element) is not int or element not in allowed:
                raise UsageError(
                    f"{self.where}: {self.path}{key}[{position}] is {show(element)}, expected {expected}",
                    hint=HINT_RELEASE,
                )
        return tuple(value)

    def choice(self, key: str, known: tuple[str, ...]) -> str | None:
        """One of the known strings; None where the key is absent or null."""
        value = self.get(key)
        if value is not None and (not isinstance(value, str) or value not in known):
            self.wrong(key, f"one of {', '.join(known)}, or no such key")
        return value


def show(value: object) -> str:
    """A JSON value for an error message: short, one line, printable ASCII."""
    if isinstance(value, dict):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        if len(value) > 8 or any(isinstance(element, dict | list) for element in value):
            return f"an array of {len(value)} elements"
        return f"[{', '.join(show(element) for element in value)}]"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    text = json.dumps(value) if value is None or isinstance(value, bool) else ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
