"""Which shards of a conversion lie on the Hub and no longer here, and what proves that they are the certificate's.

File `v4quant.uploads.jsonl` in the output folder: a line that says where, then a line a shard, each synced before the
shard is removed. A shard's line holds the hash of its certificate lines, which were compared with its bytes before they
went: so a certificate that was edited afterwards no longer fits.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from v4quant import strict_json
from v4quant.checkpoint.certificate import TensorRecord
from v4quant.checkpoint.output import disk_errors, sync_folder, write_file
from v4quant.checkpoint.reader import UPLOADS_NAME
from v4quant.errors import OutputError
from v4quant.hub.location import require_repo_id


@dataclass(frozen=True)
class UploadedShard:
    """A shard that was uploaded.

    Attributes:
        shard: its name.
        size, sha256: of the file.
        lines_sha256: of its certificate lines, see `lines_sha256`.
    """

    shard: str
    size: int
    sha256: str
    lines_sha256: str


class Uploads:
    """The record of one output folder.

    Attributes:
        repo_id: where the shards are.
        branch: on which branch of it.
        shards: by name.
    """

    def __init__(self, path: Path, repo_id: str, branch: str, shards: dict[str, UploadedShard]) -> None:
        """Use `begin_uploads` or `read_uploads`."""
        self.repo_id = repo_id
        self.branch = branch
        self.shards = shards
        self._path = path

    def add(self, shard: UploadedShard) -> None:
        """Note an uploaded shard durably.

        Raises:
            OutputError: if the disk refuses.
        """
        with disk_errors(self._path), self._path.open("ab") as file:
            file.write(json.dumps(asdict(shard)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.shards[shard.shard] = shard


def begin_uploads(folder: Path, repo_id: str, branch: str) -> Uploads:
    """Continue the record of a folder, or begin one.

    Raises:
        OutputError: if the disk refuses, or the folder's shards go elsewhere already.
    """
    found = read_uploads(folder)
    if found is None:
        first = json.dumps({"uploads": 1, "repo_id": repo_id, "branch": branch}).encode() + b"\n"
        write_file(folder / UPLOADS_NAME, [first])
        return Uploads(folder / UPLOADS_NAME, repo_id, branch, {})
    if (found.repo_id, found.branch) != (repo_id, branch):
        raise OutputError(
            f"{folder}: its shards go to {found.repo_id}, branch {found.branch}, expected {repo_id}, branch {branch}",
            hint="Repeat the command that began it, or start again with --overwrite.",
        )
    return found


def read_uploads(folder: Path) -> Uploads | None:
    """The record of a folder; None where all its shards are, or should be, in it.

    Raises:
        OutputError: if it is damaged.
    """
    path = folder / UPLOADS_NAME
    if not path.is_file():
        return None
    with disk_errors(path):
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # a kill tore the last line, whose shard is still here
            os.truncate(path, len(whole))
            sync_folder(folder)
    with contextlib.suppress(ValueError, TypeError, KeyError):
        first, *rest = [strict_json.parse(line) for line in whole.splitlines()]
        if first["uploads"] == 1 and isinstance(first["branch"], str):
            require_repo_id(first["repo_id"])
            shards = [UploadedShard(**line) for line in rest]
            return Uploads(path, first["repo_id"], first["branch"], {shard.shard: shard for shard in shards})
    raise OutputError(f"{path}: not a record that v4quant writes", hint="Convert again with --overwrite.")


def lines_sha256(records: Iterable[TensorRecord]) -> str:
    """One hash over the certificate lines of a shard's tensors, whatever order they come in."""
    digest = hashlib.sha256()
    for record in sorted(records, key=lambda record: record.tensor):
        digest.update(json.dumps(record.to_json(), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
