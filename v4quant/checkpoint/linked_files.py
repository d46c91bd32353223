"""Output files that are source files under a new name: hard links, where re-packing changes nothing in them.

Such a file is hashed for the certificate like any other, but not written: it takes no disk space, and shares its bytes
with the source from then on. A link is made before its file is read, so that what is proved is what is there.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from v4quant.checkpoint.files import Files, Source
from v4quant.checkpoint.output import PARTIAL_SUFFIX, disk_errors, sync_folder
from v4quant.errors import OutputError


class LinkedFile:
    """A linked output shard, in the place of a ShardFile: what is to be written is there already."""

    def __init__(self, path: Path, files: Source, source: str) -> None:
        """Take a link that `make_links` has made."""
        self.path = path
        self._files = files
        self._source = source

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Do nothing: the bytes were read from this very file."""

    def finish(self) -> None:
        """Check that the link still is one.

        Raises:
            OutputError: if it was replaced or removed meanwhile.
        """
        if not is_link(self._files, self._source, self.path):
            raise OutputError(
                f"{self.path}: is no longer the file that it was linked to, {self._source}",
                hint="Leave the output folder alone while it is written; then run the same command again.",
            )

    def abandon(self) -> None:
        """Leave it: it is whole."""


def is_link(files: Source, source: str, path: Path) -> bool:
    """True if a path is a hard link to a file of the source."""
    return isinstance(files, Files) and files.is_at(source, path)


def linkable(files: Source, out: Path, unchanged: Mapping[str, str]) -> dict[str, str]:
    """Those output files that can be links as far as file systems tell: source and output lie on the same.

    A source that is put together from other files, or lies elsewhere, has nothing to link to.

    Args:
        files: the source.
        out: the output folder, which need not exist yet.
        unchanged: output file -> source file with the same tensors.

    Raises:
        OutputError: if the file system does not answer.
    """
    if not isinstance(files, Files):
        return {}
    with disk_errors(out):
        existing = out.absolute()
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        device = existing.stat().st_dev
    return {name: source for name, source in unchanged.items() if files.device(source) == device}


def make_links(files: Source, out: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    """Link output files to source files, durably.

    Returns:
        Those of `wanted` that are links now; the others cannot be, for want of permission or of links in this file
        system, and must be copied.

    Raises:
        OutputError: if the disk refuses.
    """
    made = {name: source for name, source in wanted.items() if _link(files, source, out / name)}
    if made:
        with disk_errors(out):
            sync_folder(out)
    return made


def remove_links(files: Source, out: Path, links: Mapping[str, str]) -> None:
    """Remove links again; the files that they stand for stay."""
    for name, source in links.items():
        if is_link(files, source, out / name):
            with contextlib.suppress(OSError):
                (out / name).unlink()


def _link(files: Source, source: str, path: Path) -> bool:
    if is_link(files, source, path):
        return True
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        partial.unlink(missing_ok=True)
        # A snapshot in the Hub's cache holds symbolic links; what they stand for is what is linked.
        os.link(os.path.realpath(files.path(source)), partial)
        if not is_link(files, source, partial):  # replaced since it was listed, which the next read will say
            partial.unlink()
            return False
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        return False
    return True
