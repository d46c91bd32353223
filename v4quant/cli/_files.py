"""Small files that a user names: read whole, with one clear error."""

import os
from pathlib import Path

from v4quant.errors import UsageError, V4QuantError


def read_file(path: Path, most: int, expected: str, error: type[V4QuantError] = UsageError) -> bytes:
    """Read a file.

    Args:
        most: bytes that it may have.
        expected: what it should be, for the error.
        error: the class to raise.

    Raises:
        V4QuantError: of that class, if it cannot be read or is larger.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as cause:  # ValueError: a name with a zero byte
        reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(cause)
        raise error(
            f"{path}: cannot read: {reason}, expected {expected}", hint="Check the path, and the file's permissions."
        ) from None
    if len(content) > most:
        raise error(f"{path}: has more than {most:,} bytes, expected {expected}")
    return content


def read_text(path: Path, most: int, expected: str) -> str:
    """Read a text in UTF-8, its line ends as they are.

    Raises:
        UsageError: if it cannot be read, is larger, or is not UTF-8.
    """
    try:
        return read_file(path, most, expected).decode()
    except UnicodeDecodeError as cause:
        raise UsageError(f"{path}: is not UTF-8 at byte {cause.start:,}, expected {expected}") from None
