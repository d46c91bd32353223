"""Which files of a repository are wanted: by name, by layer, with or without MTP blocks."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from v4quant.checkpoint.index import INDEX_NAME, parse_index
from v4quant.errors import UsageError
from v4quant.hub.remote_files import RemoteFiles
from v4quant.names import parse_name

_LAYERS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


@dataclass(frozen=True)
class Selection:
    """What is asked for; everything by default.

    Attributes:
        include: patterns such as "*.json"; a file must fit one of them.
        exclude: patterns; a file must fit none of them.
        layers: the first and last layer of the trunk that are wanted; None for all.
        mtp: False leaves the MTP blocks out.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    layers: tuple[int, int] | None = None
    mtp: bool = True

    @property
    def is_partial(self) -> bool:
        """True if weight files may be left out."""
        return bool(self.include or self.exclude or self.layers or not self.mtp)


def parse_layers(text: str) -> tuple[int, int]:
    """Read "3" or "0-3".

    Raises:
        UsageError: if it is neither.
    """
    match = _LAYERS.fullmatch(text.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise UsageError(f"--layers is {text[:40]!r}, expected a layer or a range", hint="For example: --layers 0-3")
    return first, last


def select(files: RemoteFiles, selection: Selection) -> list[str]:
    """Names of the files that are wanted, sorted.

    A weight file is left out by layers or mtp if none of its tensors is wanted; what belongs to no block always is.

    Raises:
        UsageError: if nothing is left, or layers are asked for and there is no index to tell them by.
        HubError: if the index cannot be had.
        CheckpointError: if the index is damaged.
    """
    by_block = selection.layers is not None or not selection.mtp
    unwanted = _files_without_wanted_blocks(files, selection) if by_block else set()
    names = [
        name
        for name in files.names()
        if (not selection.include or any(fnmatchcase(name, pattern) for pattern in selection.include))
        and not any(fnmatchcase(name, pattern) for pattern in selection.exclude)
        and name not in unwanted
    ]
    if not names:
        raise UsageError(
            f"{files.where}: no file fits what was asked for", hint=f"It holds: {', '.join(files.names()[:5])}"
        )
    return names


def _files_without_wanted_blocks(files: RemoteFiles, selection: Selection) -> set[str]:
    if INDEX_NAME not in files:
        raise UsageError(
            f"{files.where}: has no {INDEX_NAME}, which --layers and --no-mtp need", hint="Choose files with --include."
        )
    index = parse_index(files.read(INDEX_NAME), f"{files.where}/{INDEX_NAME}")
    wanted: dict[str, bool] = defaultdict(bool)
    for tensor, file in index.weight_map.items():
        wanted[file] |= _is_wanted(tensor, selection)
    return {file for file, keep in wanted.items() if not keep}


def _is_wanted(tensor: str, selection: Selection) -> bool:
    parts = parse_name(tensor)
    if parts is None or parts.block not in ("layers", "mtp"):
        return True
    if parts.block == "mtp":
        return selection.mtp
    return selection.layers is None or selection.layers[0] <= parts.index <= selection.layers[1]
