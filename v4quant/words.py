"""Counts, sizes and foreign text as people read them, on a terminal and in a report; never a secret."""

import re

_TOKEN = re.compile(r"\b(hf_|hf_oauth_|Bearer\s+)[A-Za-z0-9._~+/=-]{6,}")
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")
_secrets: set[str] = set()


def remember_secret(value: str) -> None:
    """Let `without_secrets` remove this text, a token that was sent, wherever it turns up."""
    if len(value) >= 4:
        _secrets.add(value)


def without_secrets(text: str) -> str:
    """The text without tokens and without the signed part of URLs."""
    for secret in _secrets:
        text = text.replace(secret, "***")
    return _QUERY.sub(r"\1?***", _TOKEN.sub("***", text))


def escaped(text: str) -> str:
    """Make control characters visible, so that a hostile tensor or file name cannot steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
