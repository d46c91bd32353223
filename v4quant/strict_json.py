"""JSON as hostile input: no duplicate keys, no NaN or Infinity, no numbers or nesting that break the parser.

Python's own parser keeps the last of two equal keys without a word; two readers that differ there see two checkpoints.
"""

import json
import math
from collections import Counter
from typing import Any

# No number in a config, a header or an index has more: offsets within 10^19 bytes. Python itself refuses 4,300 digits.
_MAX_DIGITS = 20
# A release's config, header or index has three levels.
_MAX_NESTING = 64


def parse(text: str | bytes) -> Any:
    """Parse one JSON value.

    Args:
        text: the JSON text; bytes must be UTF-8.

    Raises:
        ValueError: saying what is wrong, if it is no such JSON.
    """
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_int=_parse_int,
            parse_float=_parse_finite,
            parse_constant=_parse_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _require_shallow(value)
    return value


def _require_shallow(value: Any) -> None:
    """Refuse nesting that this parser takes and others, or the writer of the same value, may not."""
    level: list[Any] = [[value]]
    for _ in range(_MAX_NESTING + 1):
        children = (child for holder in level for child in (holder.values() if type(holder) is dict else holder))
        level = [child for child in children if type(child) in (dict, list)]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {ascii(twice)[:80]} appears twice in one object")
    return result


def _parse_int(literal: str) -> int:
    if len(literal) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(literal)} digits")
    return int(literal)


def _parse_finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal[:32]!a} is not a finite number")
    return value
