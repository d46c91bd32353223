"""A conversion from the Hub, to the Hub, or both: neither the source nor the output ever lies whole on this disk.

From the Hub, source shards pass through the disk (spool.py). To the Hub, each finished shard is hashed, compared with
its certificate lines, uploaded to a branch of the repository, noted (uploads.py) and removed; config, index and
certificate follow at the end. main is not touched: that is what `push` does, after parity was run on the branch.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd

from v4quant.checkpoint.certificate import TensorRecord
from v4quant.checkpoint.files import Files
from v4quant.checkpoint.layout import Shard
from v4quant.checkpoint.output import disk_errors
from v4quant.checkpoint.plan import Plan
from v4quant.checkpoint.reader import JOURNAL_NAME, UPLOADS_NAME
from v4quant.checkpoint.run_folder import STATE_FOLDER, is_there
from v4quant.errors import HubError, OutputError
from v4quant.hub.card import README_NAME
from v4quant.hub.client import Hub, connect
from v4quant.hub.listing import RemoteFile
from v4quant.hub.location import Location
from v4quant.hub.origin import Origin, converted_from, downloaded_from, note_source
from v4quant.hub.publish import Content, content_of_file, stale_files
from v4quant.hub.remote_files import RemoteFiles
from v4quant.hub.spool import Spool, spool_bytes
from v4quant.hub.staging import Branch, make_repo, missing
from v4quant.hub.uploads import UploadedShard, Uploads, begin_uploads, lines_sha256, read_uploads

_READ_BYTES = 4 * 2**20
# Output shards on disk at a time when they are uploaded: one on its way, one complete, one being made.
_SHARDS_ON_DISK = 3


def pinned(location: Location, out: Path) -> Location:
    """A source at the commit that an unfinished run in `out` began with; as it is where there is no such run."""
    began = converted_from(out) if (out / JOURNAL_NAME).is_file() else None
    if began is not None and (began.repo_id, began.revision) == (location.repo_id, location.revision):
        return began.pinned
    return location


class HubRun:
    """A conversion that has to do with the Hub. Implements ShardSink.

    Attributes:
        plan: the plan to carry out; its source is read by way of the disk.
        branch: where finished shards go; None where they stay.
        spool_bytes: the most that source shards take on disk at a time.
        disk_bytes: the most that the run takes on disk at a time.
    """

    def __init__(self, plan: Plan, out: Path, source: Location | None, push: str | None, *, private: bool) -> None:
        """Prepare a run; nothing is fetched or written yet.

        Args:
            source: as the user named it; None for a folder.
            push: repository that finished shards go to; None keeps them.
            private: make that repository private.
        """
        self._hub: Hub = connect()
        self._out = out
        self._private = private
        remote = plan.source.files
        self._spool = Spool(self._hub, remote, out / STATE_FOLDER) if isinstance(remote, RemoteFiles) else None
        self.spool_bytes = spool_bytes(plan) if self._spool else 0
        self.plan = replace(plan, source=replace(plan.source, files=self._spool)) if self._spool else plan
        self.branch = Branch(self._hub, push, f"v4quant-{plan.digest[:16]}") if push else None
        self.disk_bytes = self._output_bytes() + self.spool_bytes
        self._origin = _origin(remote, source)
        self._uploads: Uploads | None = None
        self._staged: dict[str, RemoteFile] | None = None

    def begin(self, finished: set[str]) -> None:
        """The output folder is ours: note the source, begin to fetch, and make the place for the shards.

        Args:
            finished: names of the output shards that are done.

        Raises:
            HubError: if the Hub refuses or cannot be reached.
            OutputError: if the disk refuses.
        """
        if self.branch is not None:
            make_repo(self._hub, self.branch.repo_id, private=self._private)
            self.branch.make()
            self._staged = dict(self.branch.listing().files)
            self._uploads = begin_uploads(self._out, self.branch.repo_id, self.branch.name)
        if self._origin is not None:
            note_source(self._out, self._origin)
        if self._spool is not None:
            todo = [shard.name for shard in self.plan.shards if shard.name not in finished]
            self._spool.start(self.plan, todo)

    def holds(self, shard: Shard) -> bool:
        """True if a finished shard is safe: here, or noted as uploaded and still on the branch."""
        if self.branch is None:
            return is_there(self._out / shard.name, shard.file_bytes)
        known = self._known_uploads().get(shard.name)
        there = self._on_branch().get(shard.name) if known is not None else None
        is_safe = known is not None and there is not None and (there.size, there.sha256) == (known.size, known.sha256)
        if is_safe:
            with disk_errors(self._out / shard.name):  # a kill came between the note and the removal
                (self._out / shard.name).unlink(missing_ok=True)
        return is_safe

    def take(self, shard: Shard, records: list[TensorRecord]) -> None:
        """Upload a finished shard and remove it, where there is a branch; make room in the spool.

        Raises:
            HubError: if the Hub refuses or cannot be reached.
            OutputError: if the disk refuses, or gives back other bytes than those written.
        """
        if self.branch is not None:
            self._upload(self.branch, shard, records)
        if self._spool is not None:
            self._spool.finished(shard.name)

    def complete(self) -> None:
        """Put the files without weights on the branch, and compare all of it.

        Raises:
            HubError: if the Hub refuses, cannot be reached, or holds other bytes than those sent.
        """
        if self._spool is not None:
            self._spool.remove()
        if self.branch is None:
            return
        files = Files(self._out)
        contents = [
            content_of_file(files, name, self._out / name, _ignore)
            for name in files.names()
            if name not in (JOURNAL_NAME, UPLOADS_NAME, README_NAME)  # push writes a card of its own
        ]
        shards = self._known_uploads().values()
        wanted = {content.file.name: content.file for content in contents}
        wanted |= {own.shard: RemoteFile(own.shard, own.size, own.sha256, "0" * 40) for own in shards}
        there = self.branch.listing().files
        todo = [content for content in contents if content.file.name in missing(wanted, there)]
        stale = stale_files(there, wanted)
        if todo or stale:
            self.branch.put(lambda: [content.operation() for content in todo], "v4quant: config and index", stale)
        lost = missing(wanted, self.branch.listing().files)
        if lost:
            raise HubError(f"{self.branch.location}: {lost[0]} is not there as it was sent", hint="Run it again.")

    def stop(self) -> None:
        """End all fetching, so that no worker waits for it."""
        if self._spool is not None:
            self._spool.stop()

    def close(self) -> None:
        """End all fetching and let go of the files; what is there stays for the next run."""
        if self._spool is not None:
            self._spool.close()

    def _output_bytes(self) -> int:
        if self.branch is None:
            return self.plan.disk_bytes
        sizes = [shard.file_bytes for shard in self.plan.shards]
        windows = [sum(sizes[n : n + _SHARDS_ON_DISK]) for n in range(len(sizes))]
        return self.plan.disk_bytes - sum(sizes) + max(windows, default=0)

    def _known_uploads(self) -> dict[str, UploadedShard]:
        if self._uploads is None and self._out.is_dir():
            self._uploads = read_uploads(self._out)
        return self._uploads.shards if self._uploads is not None else {}

    def _on_branch(self) -> dict[str, RemoteFile]:
        if self._staged is None:
            assert self.branch is not None
            self._staged = dict(self.branch.listing().files) if self.branch.exists() else {}
        return self._staged

    def _upload(self, branch: Branch, shard: Shard, records: list[TensorRecord]) -> None:
        path = self._out / shard.name
        content = _checked_content(path, shard, records)
        if missing({shard.name: content.file}, self._on_branch()):
            operations: Callable[[], list[CommitOperationAdd]] = lambda: [content.operation()]  # noqa: E731
            branch.put(operations, f"v4quant: {shard.name}")
            self._on_branch()[shard.name] = content.file
        assert self._uploads is not None and content.file.sha256 is not None
        self._uploads.add(UploadedShard(shard.name, content.file.size, content.file.sha256, lines_sha256(records)))
        with disk_errors(path):
            path.unlink()


def _checked_content(path: Path, shard: Shard, records: list[TensorRecord]) -> Content:
    """A shard hashed in one pass, as a file and tensor by tensor; the tensors' hashes must be those of its records.

    Raises:
        OutputError: if they are not: the disk gives back other bytes than were written.
    """
    whole, wanted = hashlib.sha256(), {record.tensor: record.sha256 for record in records}
    with disk_errors(path), path.open("rb") as file:
        whole.update(header := file.read(len(shard.header)))
        for entry in sorted(shard.entries.values(), key=lambda entry: entry.start):
            own, left = hashlib.sha256(), entry.bytes
            while left and (chunk := file.read(min(left, _READ_BYTES))):
                own.update(chunk)
                whole.update(chunk)
                left -= len(chunk)
            if own.hexdigest() != wanted.get(entry.name):
                raise OutputError(
                    f"{path}: {entry.name} does not have the bytes that were written",
                    hint="Check the disk; remove the folder and convert again.",
                )
        if header != shard.header or file.read(1):
            raise OutputError(f"{path}: is not the file that was written", hint="Check the disk.")
    return Content(RemoteFile(shard.name, shard.file_bytes, whole.hexdigest(), "0" * 40), path)


def _origin(files: object, source: Location | None) -> Origin | None:
    """Where the source is, to be noted in the output."""
    if isinstance(files, RemoteFiles):
        assert source is not None
        return Origin(files.listing.repo_id, source.revision, files.listing.commit)
    return downloaded_from(Path(files.where)) if isinstance(files, Files) else None


def _ignore(_count: int, _file: str) -> None:
    """Report progress to nobody."""
