"""What a repository holds at one commit: names, sizes and hashes, read as hostile input.

The Hub knows the sha256 of large files and git's sha1 of small ones, so that every file can be checked. A name that
could leave the folder that it is written to, or be taken for another, makes the whole repository refused.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
from huggingface_hub import get_session
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._http import hf_raise_for_status

from v4quant.errors import CheckpointError, HubError
from v4quant.hub.client import Hub
from v4quant.hub.errors import hub_errors
from v4quant.hub.location import Location
from v4quant.hub.retry import persist
from v4quant.strict_json import parse

MAX_FILES = 100_000
# Of a thousand entries, folders among them; a server that always names a next one is not followed for ever.
_MAX_PAGES = 500
_MAX_NAME = 1_000  # characters; a part of it, 255 bytes, as file systems have it
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: path in the repository.
        size: bytes.
        sha256: of its content; None for a small file that git itself holds.
        git_sha1: of git's blob: the content of a small file.
        xet_hash: where Xet storage holds it; None elsewhere.
    """

    name: str
    size: int
    sha256: str | None
    git_sha1: str
    xet_hash: str | None = None

    @property
    def digest(self) -> str:
        """The hash that its content must have."""
        return self.sha256 or self.git_sha1

    def hasher(self) -> "hashlib._Hash":
        """A hash of the kind of `digest`, to feed the content to."""
        if self.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)

    @property
    def key(self) -> str:
        """A name made of content and path: two files of one content have two."""
        return f"{self.digest}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    @property
    def is_hidden(self) -> bool:
        """True for .gitattributes and the like, which are no part of a checkpoint."""
        return any(part.startswith(".") for part in self.name.split("/"))


@dataclass(frozen=True)
class Listing:
    """A repository at a commit.

    Attributes:
        repo_id: "owner/name".
        revision: what the user asked for; None for the main branch.
        commit: what that was when it was looked up.
        files: by name, sorted; hidden ones too.
    """

    repo_id: str
    revision: str | None
    commit: str
    files: Mapping[str, RemoteFile]

    def __str__(self) -> str:
        return f"hf://{self.repo_id}@{self.commit}"


def resolve(hub: Hub, location: Location) -> str:
    """The commit that a location is at now.

    Raises:
        HubError: if there is no such repository or revision, or the Hub cannot be reached.
    """
    if location.is_commit:
        assert location.revision is not None
        return location.revision
    commit = persist(str(location), lambda: hub.api.model_info(location.repo_id, revision=location.revision).sha)
    if not isinstance(commit, str) or _SHA1.fullmatch(commit) is None:
        raise HubError(f"{location}: the Hub names no commit, found {str(commit)[:60]!r}")
    return commit


def list_files(hub: Hub, location: Location, commit: str) -> Listing:
    """Everything that a commit holds.

    Raises:
        HubError: if the Hub cannot be reached or answers nonsense.
        CheckpointError: if a name is not one that a file may have.
    """
    where = f"hf://{location.repo_id}@{commit}"
    found: list[RemoteFile] = []
    url: str | None = f"{hub.endpoint}/api/models/{location.repo_id}/tree/{commit}?recursive=true"
    for _ in range(_MAX_PAGES):
        response = persist(where, lambda url=url: _page(hub, url))  # type: ignore[misc]
        with hub_errors(where):
            found += [_remote_file(entry) for entry in response.json() if entry["type"] == "file"]
            url = response.links.get("next", {}).get("url")
        if url is None or len(found) > MAX_FILES:
            break
    if url is not None or len(found) > MAX_FILES:
        raise CheckpointError(f"{where}: holds more than {MAX_FILES:,} files, expected a checkpoint")
    return Listing(location.repo_id, location.revision, commit, checked(found, where))


def _page(hub: Hub, url: str) -> httpx2.Response:
    response = get_session().get(url, headers=hub.headers())
    hf_raise_for_status(response)
    return response


def _remote_file(entry: dict[str, Any]) -> RemoteFile:
    file = RepoFile(**entry)  # type: ignore[no-untyped-call]
    lfs = file.lfs.sha256 if file.lfs is not None else None
    return RemoteFile(file.path, file.size, lfs, file.blob_id, file.xet_hash)


def listing_from_json(text: bytes, location: Location, commit: str) -> Listing:
    """A listing that was kept.

    Raises:
        ValueError: if it is damaged.
    """
    where = f"hf://{location.repo_id}@{commit}"
    rows = parse(text)
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 5 for row in rows):
        raise ValueError("not a listing")
    return Listing(location.repo_id, location.revision, commit, checked([RemoteFile(*row) for row in rows], where))


def checked(found: Iterable[RemoteFile], where: str) -> dict[str, RemoteFile]:
    """Files by name, sorted, each with a name that is safe to write and a size and hash that can be.

    Raises:
        CheckpointError: if a name is unsafe, or two would be one file on some disks.
        HubError: if a size or hash is none.
    """
    files: dict[str, RemoteFile] = {}
    folded: dict[str, str] = {}
    for file in found:
        _require_safe(file.name, where)
        first = folded.setdefault(unicodedata.normalize("NFC", file.name).casefold(), file.name)
        if first != file.name or file.name in files:
            raise CheckpointError(
                f"{where}: {file.name[:200]!r} and {first[:200]!r} are one file on some disks, expected names apart",
                hint="Ask the repository's owner to rename one.",
            )
        if type(file.size) is not int or not 0 <= file.size < 2**50:
            raise HubError(f"{where}: {file.name}: has size {str(file.size)[:40]}, expected bytes")
        hashes = [(file.sha256, _SHA256), (file.git_sha1, _SHA1)]
        if not all(
            value is None or (isinstance(value, str) and form.fullmatch(value)) for value, form in hashes
        ) or not isinstance(file.digest, str):
            raise HubError(f"{where}: {file.name}: the Hub gives no hash, expected sha256 or git's sha1")
        files[file.name] = file
    for name in files:
        _require_no_file_above(name, folded, where)
    return dict(sorted(files.items()))


def _require_safe(name: object, where: str) -> None:
    """Refuse a name that is absolute, leads upwards, hides something from the eye, or is too long for a disk."""
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise CheckpointError(f"{where}: holds a file of the name {str(name)[:60]!r}, expected a path")
    parts = name.split("/")
    unsafe = (
        any(part in ("", ".", "..") or part != part.strip() or part.endswith(".") for part in parts)
        or any(character in '\\:*?"<>|' for character in name)
        or any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in name)
        or any(part.casefold() in (".git", ".v4quant") for part in parts)
    )
    if unsafe or any(len(part.encode(errors="replace")) > 240 for part in parts):
        raise CheckpointError(
            f"{where}: holds a file of the name {name[:200]!a}, which is not safe to write, expected a plain path",
            hint="Nothing was read or written. Tell the repository's owner.",
        )


def _require_no_file_above(name: str, folded: Mapping[str, str], where: str) -> None:
    """Refuse a listing in which one name is a folder and a file at once."""
    folder = name.rpartition("/")[0]
    while folder:
        if unicodedata.normalize("NFC", folder).casefold() in folded:
            raise CheckpointError(f"{where}: {folder!r} is a file and a folder, expected one")
        folder = folder.rpartition("/")[0]
