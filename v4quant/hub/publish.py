"""Put a checked folder on the Hub so that nobody ever sees half of it.

1. A branch of its own collects the files: shards first, then the rest, config and index last.
2. The sizes and hashes that the Hub lists for the branch are compared with those here.
3. One commit makes all of it visible, on main, another branch or as a pull request: pointers to what is there already.
4. The branch is removed.

The branch's name is made of what is published, so a run that was killed anywhere finds what it has uploaded.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

from v4quant.checkpoint.files import Source
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.config import CONFIG_NAME
from v4quant.errors import HubError
from v4quant.hub.client import Hub
from v4quant.hub.errors import hub_errors
from v4quant.hub.listing import RemoteFile, checked, list_files
from v4quant.hub.location import Location
from v4quant.hub.retry import persist
from v4quant.hub.staging import Branch, Operation, missing, same

_READ_BYTES = 4 * 2**20
_LAST = {INDEX_NAME, CONFIG_NAME}
# In one commit to the branch: much, so that the Hub's limits on commits are far; not all, as a kill loses that much.
_FILES_A_COMMIT = 16
_BYTES_A_COMMIT = 20_000_000_000
_PREFIX = "v4quant-"
Advance = Callable[[int, str], None]


@dataclass(frozen=True)
class Content:
    """A file to publish.

    Attributes:
        file: its name, size and hashes.
        data: its path here, or its bytes; None where it is on the branch already.
    """

    file: RemoteFile
    data: Path | bytes | None

    def operation(self) -> CommitOperationAdd:
        """What adds it to a commit."""
        assert self.data is not None and self.file.sha256 is not None
        operation = CommitOperationAdd(path_in_repo=self.file.name, path_or_fileobj=self.data)
        operation.upload_info.sha256 = bytes.fromhex(self.file.sha256)
        return operation


@dataclass(frozen=True)
class Target:
    """Where to publish.

    Attributes:
        repo_id: the repository.
        revision: the branch that shows the result.
        create_pr: open a pull request to main instead.
        message: of the commit.
    """

    repo_id: str
    revision: str = "main"
    create_pr: bool = False
    message: str = ""


@dataclass
class Published:
    """What came of it.

    Attributes:
        commit: that shows the files.
        url: of the commit or the pull request.
        uploaded: names of the files that were sent in this run.
    """

    commit: str
    url: str
    uploaded: list[str] = field(default_factory=list)


def content_of_bytes(name: str, data: bytes) -> Content:
    """A file that was made just now."""
    git = hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
    return Content(RemoteFile(name, len(data), hashlib.sha256(data).hexdigest(), git), data)


def content_of_file(files: Source, name: str, path: Path, advance: Advance) -> Content:
    """A file of a folder, hashed.

    Raises:
        CheckpointError: if it cannot be read or changes meanwhile.
    """
    size = files.size(name)
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    for start in range(0, size, _READ_BYTES):
        chunk = files.read(name, start, min(start + _READ_BYTES, size))
        sha256.update(chunk)
        git.update(chunk)
        advance(len(chunk), name)
    files.require_unchanged(name)
    return Content(RemoteFile(name, size, sha256.hexdigest(), git.hexdigest()), path)


def branch_name(target: Target, contents: Iterable[Content]) -> str:
    """The name of the branch for these files."""
    digest = hashlib.sha256(target.revision.encode())
    for content in sorted(contents, key=lambda content: content.file.name):
        digest.update(f"\0{content.file.name}\0{content.file.sha256}".encode())
    return _PREFIX + digest.hexdigest()[:16]


def publish(
    hub: Hub, target: Target, branch: Branch, contents: list[Content], unchanged: Callable[[], None], advance: Advance
) -> Published:
    """Upload, compare, and make visible.

    Args:
        branch: where to collect the files.
        contents: all files of the checkpoint.
        unchanged: called right before the commit; raises if a file here has changed since it was hashed.
        advance: told bytes uploaded, and of which file.

    Raises:
        HubError: if the Hub refuses, cannot be reached, or holds other bytes than those sent; then nothing is visible.
        CheckpointError: if a file changed meanwhile.
    """
    wanted = checked([content.file for content in contents], f"hf://{target.repo_id}")
    done = None if target.create_pr else _already(hub, target, wanted)
    if done is not None:
        branch.remove()  # a run before this one was killed after the last commit
        return done
    branch.make()
    uploaded = _upload(branch, contents, target.message, advance)
    unchanged()
    commit = _require_all_there(branch, wanted)
    result = _show(hub, target, commit, wanted)
    result.uploaded = uploaded
    branch.remove()
    return result


def stale_files(there: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Files of an earlier checkpoint that would contradict this one: weights, index, certificate, reports."""
    return sorted(
        name
        for name in set(there) - set(wanted)
        if name == INDEX_NAME or ("/" not in name and name.endswith(".safetensors")) or name.startswith("v4quant.")
    )


def _already(hub: Hub, target: Target, wanted: Mapping[str, RemoteFile]) -> Published | None:
    """The commit that shows just these files; None if the target does not yet."""
    place = Branch(hub, target.repo_id, target.revision)
    if not place.exists():
        place.make()
    listing = place.listing()
    if missing(wanted, listing.files) or stale_files(listing.files, wanted):
        return None
    return Published(listing.commit, f"{hub.endpoint}/{target.repo_id}/commit/{listing.commit}")


def _upload(branch: Branch, contents: list[Content], message: str, advance: Advance) -> list[str]:
    """Put on the branch what it lacks; returns the names."""
    lacking = set(missing({content.file.name: content.file for content in contents}, branch.listing().files))
    todo = [content for content in contents if content.file.name in lacking]
    lost = [content.file.name for content in todo if content.data is None]
    if lost:
        raise HubError(
            f"{branch.location}: no longer holds {lost[0]}, which was uploaded and is not here any more",
            hint="Convert again with --overwrite.",
        )
    for batch in _batches(todo):
        branch.put(lambda batch=batch: [content.operation() for content in batch], message or "v4quant: files")  # type: ignore[misc]
        for content in batch:
            advance(content.file.size, content.file.name)
    return [content.file.name for content in todo]


def _batches(contents: list[Content]) -> Iterator[list[Content]]:
    """Weights first, then the rest, config and index last; some files a commit."""
    ranks: dict[int, list[Content]] = {0: [], 1: [], 2: []}
    for content in contents:
        name = content.file.name
        ranks[2 if name in _LAST else 0 if name.endswith(".safetensors") else 1].append(content)
    for group in ranks.values():
        batch: list[Content] = []
        for content in group:
            if len(batch) == _FILES_A_COMMIT or sum(own.file.size for own in batch) > _BYTES_A_COMMIT:
                yield batch
                batch = []
            batch.append(content)
        if batch:
            yield batch


def _require_all_there(branch: Branch, wanted: Mapping[str, RemoteFile]) -> str:
    """Compare the branch with what was sent; returns its commit."""
    listing = branch.listing()
    wrong = missing(wanted, listing.files)
    if wrong:
        raise HubError(
            f"{branch.location}: {wrong[0]} is not there as it was sent, nor {len(wrong) - 1:,} other files",
            hint="Run the same command again; it sends what is missing.",
        )
    return listing.commit


def _show(hub: Hub, target: Target, staged: str, wanted: Mapping[str, RemoteFile]) -> Published:
    """The one commit that makes everything visible."""
    place = Branch(hub, target.repo_id, target.revision)
    where = str(place.location)
    before = place.listing()
    # huggingface_hub leaves out of a commit what is there already, but asks for each file; we know.
    changed = missing(wanted, before.files)
    operations: list[Operation] = [
        *(CommitOperationCopy(src_path_in_repo=name, path_in_repo=name, src_revision=staged) for name in changed),
        *(CommitOperationDelete(path_in_repo=name) for name in stale_files(before.files, wanted)),
    ]

    def commit() -> Published:
        found = _shown(hub, target, wanted)
        if found is not None:  # the answer to an earlier try was lost
            return found
        info = hub.api.create_commit(
            target.repo_id,
            operations,
            commit_message=target.message,
            revision=None if target.create_pr else target.revision,
            create_pr=target.create_pr,
            parent_commit=before.commit,
        )
        return Published(info.oid, info.pr_url or info.commit_url)

    result = persist(where, commit)
    with hub_errors(where):
        after = list_files(hub, Location(target.repo_id, result.commit), result.commit)
    wrong = [name for name, file in wanted.items() if name not in after.files or not same(file, after.files[name])]
    if wrong:
        raise HubError(f"{after}: {wrong[0]} is not as it was sent", hint="Look at the repository's history.")
    return result


def _shown(hub: Hub, target: Target, wanted: Mapping[str, RemoteFile]) -> Published | None:
    return None if target.create_pr else _already(hub, target, wanted)
