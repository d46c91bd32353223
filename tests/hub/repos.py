"""What the test Hub holds: repositories with commits, branches and pull requests, and large files by sha256."""

import hashlib
import itertools
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

MAIN = "refs/heads/main"
LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".pdf")
# Files beyond this are large whatever they are called.
LFS_BYTES = 10 * 2**20
_POINTER_BYTES = 134


@dataclass(frozen=True)
class Blob:
    """A file of a commit: small, with its bytes, or large, by its sha256."""

    size: int
    git_sha1: str
    sha256: str | None = None
    data: bytes = b""

    def to_json(self, path: str) -> dict[str, object]:
        """An entry of a tree listing."""
        lfs = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": _POINTER_BYTES}} if self.sha256 else {}
        return {"type": "file", "oid": self.git_sha1, "size": self.size, "path": path, **lfs}

    @property
    def oid(self) -> str:
        """What preupload calls its oid."""
        return self.sha256 or self.git_sha1


def small(data: bytes) -> Blob:
    """A file that git holds."""
    return Blob(len(data), git_sha1(data), data=data)


def large(sha256: str, size: int) -> Blob:
    """A file that git holds a pointer to."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Blob(size, git_sha1(pointer.encode()), sha256)


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    tree: dict[str, Blob]


@dataclass
class Repo:
    """One repository."""

    repo_id: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    pulls: dict[int, str] = field(default_factory=dict)  # title by number
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def ref(self, revision: str) -> str | None:
        """The full name of a branch or pull request."""
        return next((ref for ref in (revision, f"refs/heads/{revision}") if ref in self.refs), None)

    def commit_of(self, revision: str) -> Commit | None:
        """The commit that a revision names."""
        ref = self.ref(revision)
        return self.commits.get(self.refs[ref] if ref else revision)

    def add_commit(self, ref: str, message: str, tree: dict[str, Blob]) -> Commit:
        """Put a commit on a branch."""
        parent = self.refs.get(ref)
        oid = hashlib.sha1(
            f"{self.repo_id} {next(self._numbers)} {message}".encode(), usedforsecurity=False
        ).hexdigest()
        commit = Commit(oid, parent, message, dict(sorted(tree.items())))
        self.commits[oid] = commit
        self.refs[ref] = oid
        return commit

    @property
    def main(self) -> dict[str, Blob]:
        """What everybody sees."""
        return self.commits[self.refs[MAIN]].tree


class Store:
    """All repositories, and the large files of them all, on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()

    def create(self, repo_id: str, *, private: bool = False) -> Repo:
        """A repository with the first commit that the Hub makes."""
        repo = self.repos[repo_id] = Repo(repo_id, private)
        repo.add_commit(MAIN, "initial commit", {".gitattributes": small(b"*.safetensors filter=lfs\n")})
        return repo

    def object_path(self, sha256: str) -> Path:
        return self.folder / sha256

    def add_folder(self, repo_id: str, folder: Path, *, names: Iterable[str] | None = None) -> Repo:
        """Publish a folder as it is, in one commit, as another tool would."""
        repo = self.repos.get(repo_id) or self.create(repo_id)
        tree = dict(repo.main)
        paths = [folder / name for name in names] if names is not None else sorted(folder.rglob("*"))
        for path in paths:
            if path.is_file():
                tree[str(path.relative_to(folder))] = self.add_file(repo, path.name, path.read_bytes())
        repo.add_commit(MAIN, "files", tree)
        return repo

    def add_file(self, repo: Repo, name: str, data: bytes) -> Blob:
        """Store the content of a file."""
        if not name.endswith(LFS_SUFFIXES) and len(data) <= LFS_BYTES:
            return small(data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.object_path(sha256).write_bytes(data)
        repo.lfs.add(sha256)
        return large(sha256, len(data))

    def content(self, blob: Blob) -> bytes:
        """Bytes of a file."""
        return self.object_path(blob.sha256).read_bytes() if blob.sha256 else blob.data

    def write_folder(self, tree: dict[str, Blob], folder: Path) -> Path:
        """A tree as a local folder."""
        for name, blob in tree.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(self.content(blob))
        return folder
