"""The result of a parity run as a page for people and as JSON.

page                what stands where; page.html has the looks
verdict, findings, conversations, run_facts, plots    its parts
markup, figures     foreign text made safe, numbers as people read them
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from v4quant.checkpoint.output import disk_errors, write_file

JSON_NAME = "parity.json"
PAGE_NAME = "report.html"
_LINE_WIDTH = 110
# A list of numbers as json.dumps indents it. JSON strings hold no line ends, so this matches no part of one.
_NUMBERS = re.compile(r"\[\n(?:\s+-?\d[\d.eE+-]*,?\n)+(\s*)\]")


def write_report(result: Mapping[str, Any], folder: Path) -> Path:
    """Write a parity result as `parity.json` and `report.html`; the same result makes the same bytes.

    Args:
        result: what a parity run found: the object that parity.json holds.
        folder: made if it is missing; an earlier report in it is replaced.

    Returns:
        The path of the page.

    Raises:
        OutputError: if the disk refuses; then the earlier report is whole, or there is no parity.json.
        ValueError: if the result holds NaN or an infinity; nothing is written then.
    """
    from v4quant.parity.report.page import build_page  # matplotlib takes a second; only who draws waits for it

    text, page = to_json(result), build_page(result)
    with disk_errors(folder):  # whoever finds a parity.json finds its page beside it
        (folder / JSON_NAME).unlink(missing_ok=True)
    write_file(folder / PAGE_NAME, [page.encode()])
    write_file(folder / JSON_NAME, [text.encode()])
    return folder / PAGE_NAME


def to_json(result: Mapping[str, Any]) -> str:
    """JSON to read: indented, lists of numbers filled into lines.

    Raises:
        ValueError: if it holds NaN or an infinity.
    """
    return _NUMBERS.sub(_fill, json.dumps(result, indent=2, allow_nan=False)) + "\n"


def _fill(found: re.Match[str]) -> str:
    """A list of numbers on one line, or on as many as it takes."""
    inner, outer = found[0][1:-1].split(), found[1]
    lines = [""]
    for item in inner:
        if len(lines[-1]) + len(item) > _LINE_WIDTH:
            lines.append("")
        lines[-1] += f" {item}" if lines[-1] else item
    if len(lines) == 1:
        return f"[{lines[0]}]"
    return "[\n" + "".join(f"{outer}  {line}\n" for line in lines) + f"{outer}]"
