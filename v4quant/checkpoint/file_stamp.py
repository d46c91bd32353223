"""Telling an unchanged file from a changed one without reading it."""

import contextlib
import os
from collections.abc import Mapping
from typing import NamedTuple


class Stamp(NamedTuple):
    """What the file system says of a file.

    Attributes:
        size: bytes.
        mtime_ns: time of the last change of data.
        ctime_ns: time of the last change of anything, which cannot be set by hand.
        inode: number of the file.
        links: how many names it has.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    links: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Stamp":
        """What was found."""
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_nlink)

    def is_same(self, other: "Stamp") -> bool:
        """True if these are two looks at the same unchanged file.

        A hard link that was made or removed meanwhile, by this run or another one, sets the time of last change too.
        Where the number of names shows that, size, time of last change of data and inode must do. A file without a
        name is one that was replaced.
        """
        is_relinked = self.links != other.links and self.inode == other.inode and min(self.links, other.links) > 0
        return self[:2] == other[:2] and (self.ctime_ns == other.ctime_ns or is_relinked)


def is_same_fingerprint(first: str, second: str) -> bool:
    """True if two fingerprints, taken at different times, are of the same unchanged file."""
    with contextlib.suppress(ValueError, TypeError):
        return Stamp(*map(int, first.split(" "))).is_same(Stamp(*map(int, second.split(" "))))
    return first == second


def is_same_elsewhere(first: str, second: str) -> bool:
    """True if two fingerprints, taken by two processes, are of the same file as both see it.

    Of a file on a shared disk its size and the time of its last change of data must do: links may come and go between
    the two looks, and a machine may number files in its own way.
    """
    ours, theirs = first.split(" "), second.split(" ")
    is_stamp = len(ours) == len(theirs) == len(Stamp._fields)
    return ours[:2] == theirs[:2] if is_stamp else first == second


def seen_differently(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Names of the files that another process sees as others; by name their fingerprints."""
    both = ours.keys() & theirs.keys()
    changed = {name for name in both if not is_same_elsewhere(ours[name], theirs[name])}
    return sorted((ours.keys() ^ theirs.keys()) | changed)
