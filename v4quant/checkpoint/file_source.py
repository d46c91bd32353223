"""What a checkpoint is read through: named files, of a local folder or anywhere else, by byte range.

`Files` (files.py) reads a local folder; a repository on the Hub is another implementation. All that opens, plans,
converts and verifies knows no more of its source than this.
"""

from typing import Protocol


class FileSource(Protocol):
    """The files of one checkpoint, by relative path with "/"; they do not change while they are read.

    Attributes:
        where: the place, as messages name it.
    """

    @property
    def where(self) -> str:
        """The place, as messages name it."""

    def names(self) -> list[str]:
        """Relative paths of all files, sorted."""

    def __contains__(self, name: str) -> bool:
        """True if there is a file of this name."""

    def size(self, name: str) -> int:
        """Bytes of a file, as it was listed."""

    def fingerprint(self, name: str) -> str:
        """What tells a file from a changed one without reading it."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes [start, stop) of a file, all of it by default.

        Raises:
            V4QuantError: if they cannot be read, or are not those that were listed.
        """

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from `start` on; safe from any thread.

        Raises:
            V4QuantError: if they cannot be read, or are not those that were listed.
        """

    def require_unchanged(self, name: str) -> None:
        """Check that a file is still the one that was listed.

        Raises:
            V4QuantError: if it is not.
        """
