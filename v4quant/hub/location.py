"""Where a checkpoint is: a local folder, or a repository on the Hub at a revision.

hf://OWNER/NAME            the repository's main branch
hf://OWNER/NAME@REVISION   a branch, tag, pull request (refs/pr/3) or commit
OWNER/NAME                 the same as hf://OWNER/NAME, unless there is such a folder
"""

import re
from dataclasses import dataclass
from pathlib import Path

from v4quant.errors import UsageError

PREFIX = "hf://"
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_REPO_ID = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,254}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Location:
    """A repository at a revision.

    Attributes:
        repo_id: "owner/name".
        revision: branch, tag, pull request or commit; None for the main branch.
    """

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo_id}" + (f"@{self.revision}" if self.revision else "")

    @property
    def is_commit(self) -> bool:
        """True if the revision names a commit, which never changes."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def parse_location(text: str) -> Location | None:
    """Read what a user gave as a source.

    Returns:
        The repository; None for a local folder.

    Raises:
        UsageError: if it begins with hf:// and is no repository.
    """
    if not text.startswith(PREFIX):
        is_remote = _REPO_ID.fullmatch(text) is not None and not Path(text).exists()
        return parse_location(PREFIX + text) if is_remote else None
    repo_id, at, revision = text.removeprefix(PREFIX).partition("@")
    require_repo_id(repo_id)
    if not at:
        return Location(repo_id)
    require_revision(revision)
    return Location(repo_id, revision)


def require_revision(text: str) -> None:
    """Check the name of a branch, tag or commit.

    Raises:
        UsageError: if git would not have it.
    """
    if _REVISION.fullmatch(text) is None or ".." in text or text.endswith((".lock", "/")):
        raise UsageError(
            f"{text[:200]!r} is no revision, expected a branch, tag or commit",
            hint="For example: hf://deepseek-ai/DeepSeek-V4-Flash@main",
        )


def require_repo_id(text: str) -> None:
    """Check the name of a repository.

    Raises:
        UsageError: if it is not OWNER/NAME in the Hub's characters.
    """
    if _REPO_ID.fullmatch(text) is None or ".." in text or "--" in text or text.endswith((".git", ".ipynb")):
        raise UsageError(
            f"{text[:200]!r} is no repository, expected OWNER/NAME of letters, digits, '-', '_' and '.'",
            hint="For example: deepseek-ai/DeepSeek-V4-Flash",
        )
