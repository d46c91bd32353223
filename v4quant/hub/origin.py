"""Which repository and commit a folder came from: noted where it was made, read where it is converted or published.

.v4quant/download.json   in a downloaded folder; hidden, as it is no part of the checkpoint
v4quant.source.json      in a converted folder: where its source was; published with it
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from v4quant import strict_json
from v4quant.checkpoint.output import write_file
from v4quant.checkpoint.reader import SOURCE_NAME
from v4quant.checkpoint.run_folder import STATE_FOLDER
from v4quant.errors import UsageError
from v4quant.hub.location import Location, parse_location

_DOWNLOAD_NAME = "download.json"
_MAX_BYTES = 2**16


@dataclass(frozen=True)
class Origin:
    """A repository at a commit.

    Attributes:
        repo_id: "owner/name".
        revision: what was asked for; None for the main branch.
        commit: what that was then.
    """

    repo_id: str
    revision: str | None
    commit: str

    def __str__(self) -> str:
        return f"hf://{self.repo_id}@{self.commit}"

    @property
    def pinned(self) -> Location:
        """The same for ever."""
        return Location(self.repo_id, self.commit)


def downloaded_from(folder: Path) -> Origin | None:
    """What a folder was downloaded from; None where that was not noted."""
    return _read(folder / STATE_FOLDER / _DOWNLOAD_NAME)


def note_download(folder: Path, origin: Origin) -> None:
    """Note what is being downloaded into a folder.

    Raises:
        OutputError: if the disk refuses.
    """
    _write(folder / STATE_FOLDER / _DOWNLOAD_NAME, origin)


def converted_from(folder: Path) -> Origin | None:
    """Where the source of a converted folder was; None where that was not noted."""
    return _read(folder / SOURCE_NAME)


def note_source(folder: Path, origin: Origin) -> None:
    """Note where the source of a conversion is.

    Raises:
        OutputError: if the disk refuses.
    """
    _write(folder / SOURCE_NAME, origin)


def parse_origin(text: bytes) -> Origin | None:
    """Read a note; None if it is none, as it only says where to look and proves nothing."""
    with contextlib.suppress(ValueError, TypeError, KeyError, UsageError):
        values = strict_json.parse(text)
        origin = Origin(values["repo_id"], values["revision"], values["commit"])
        revision = f"@{origin.revision}" if origin.revision is not None else ""
        if origin.pinned.is_commit and parse_location(f"hf://{origin.repo_id}{revision}") is not None:
            return origin
    return None


def _read(path: Path) -> Origin | None:
    with contextlib.suppress(OSError):
        if path.stat().st_size <= _MAX_BYTES:
            return parse_origin(path.read_bytes())
    return None


def _write(path: Path, origin: Origin) -> None:
    write_file(path, [json.dumps(asdict(origin), indent=2).encode() + b"\n"])
