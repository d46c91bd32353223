"""A branch of a repository where files are collected and checked before anybody's main shows them.

Each call may be repeated: what is there already is not sent again, and an answer that was lost is looked up.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from v4quant.errors import HubError
from v4quant.hub.client import Hub
from v4quant.hub.listing import Listing, RemoteFile, list_files, resolve
from v4quant.hub.location import Location
from v4quant.hub.retry import persist

Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete
_THREADS = 4


@dataclass(frozen=True)
class Branch:
    """A branch that files are put on.

    Attributes:
        hub: the Hub.
        repo_id: the repository.
        name: of the branch.
    """

    hub: Hub
    repo_id: str
    name: str

    @property
    def location(self) -> Location:
        """Where it is."""
        return Location(self.repo_id, self.name)

    def exists(self) -> bool:
        """True if there is such a repository and branch.

        Raises:
            HubError: if the Hub refuses or cannot be reached.
        """

        def look() -> bool:
            try:
                self.hub.api.model_info(self.repo_id, revision=self.name)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return False
            return True

        return persist(str(self.location), look)

    def make(self) -> None:
        """Make the branch where it is missing, from main.

        Raises:
            HubError: if the Hub refuses or cannot be reached.
        """
        where = str(self.location)
        persist(where, lambda: self.hub.api.create_branch(self.repo_id, branch=self.name, exist_ok=True))

    def remove(self) -> None:
        """Remove the branch; one that is gone is fine.

        Raises:
            HubError: if the Hub refuses or cannot be reached.
        """
        if self.exists():
            persist(str(self.location), lambda: self.hub.api.delete_branch(self.repo_id, branch=self.name))

    def listing(self) -> Listing:
        """What the branch holds now, and at which commit.

        Raises:
            HubError: if the Hub refuses or cannot be reached.
            CheckpointError: if it holds names that are not safe.
        """
        return list_files(self.hub, self.location, resolve(self.hub, self.location))

    def put(self, additions: Callable[[], list[CommitOperationAdd]], message: str, remove: Iterable[str] = ()) -> None:
        """Upload files and commit them to the branch.

        Args:
            additions: makes the operations; called again for another try.
            message: of the commit.
            remove: names of files to remove; they are there.

        Raises:
            HubError: if the Hub refuses or cannot be reached.
        """
        names = list(remove)

        def commit() -> None:
            operations: list[Operation] = [*additions(), *(CommitOperationDelete(path_in_repo=name) for name in names)]
            self.hub.api.create_commit(
                self.repo_id, operations, commit_message=message, revision=self.name, num_threads=_THREADS
            )

        persist(str(self.location), commit)


def make_repo(hub: Hub, repo_id: str, *, private: bool) -> None:
    """Make a repository where it is missing.

    Args:
        private: make it private; one that is public already is refused, as what is staged would be for all to see.

    Raises:
        HubError: if the Hub refuses or cannot be reached.
    """
    where = f"hf://{repo_id}"

    def look() -> ModelInfo | None:
        try:
            return hub.api.model_info(repo_id)
        except RepositoryNotFoundError:
            return None

    info = persist(where, look)
    if info is None:
        persist(where, lambda: hub.api.create_repo(repo_id, private=private or None, exist_ok=True))
    elif private and not info.private:
        raise HubError(
            f"{where}: is public, expected a private repository, as --private is given",
            hint="Make it private in its settings, choose another name, or leave --private out.",
        )


def missing(wanted: Mapping[str, RemoteFile], there: Mapping[str, RemoteFile]) -> list[str]:
    """Names of files that are not there, or not with these bytes."""
    return [name for name, file in wanted.items() if name not in there or not same(file, there[name])]


def same(one: RemoteFile, other: RemoteFile) -> bool:
    """True if two files have the same bytes, by size and hash; the hashes are of one kind where both sides know it."""
    if one.size != other.size:
        return False
    if one.sha256 is not None and other.sha256 is not None:
        return one.sha256 == other.sha256
    return one.git_sha1 == other.git_sha1
