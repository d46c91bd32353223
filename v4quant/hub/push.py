"""`push`: a folder through the gate, with a card, onto the Hub."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4quant.checkpoint.files import Files
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.reader import (
    JOURNAL_NAME,
    SHARDS_NAME,
    UPLOADS_NAME,
    Checkpoint,
    open_checkpoint,
    open_source,
)
from v4quant.errors import CheckFailedError, CheckpointError
from v4quant.hub.card import README_NAME, Card, build_card
from v4quant.hub.client import Hub, connect
from v4quant.hub.gate import Exam, examine
from v4quant.hub.listing import RemoteFile
from v4quant.hub.location import Location
from v4quant.hub.mixed_files import MixedFiles
from v4quant.hub.origin import converted_from
from v4quant.hub.publish import (
    Advance,
    Content,
    Published,
    Target,
    branch_name,
    content_of_bytes,
    content_of_file,
    publish,
)
from v4quant.hub.remote_files import RemoteFiles, open_remote, prefetch_checkpoint
from v4quant.hub.staging import Branch, make_repo
from v4quant.hub.uploads import Uploads, read_uploads

PARITY_NAME = "v4quant.parity.json"
_NO_GIT_HASH = "0" * 40  # of a shard, which the Hub always holds by its sha256
_SHOWN = 10


@dataclass
class Parcel:
    """A folder that was examined, and what goes to the Hub.

    Attributes:
        checkpoint: what is published.
        exam: what it has passed.
        card: its model card.
        made: the files that were made for it: card, pictures, report.
        uploads: shards that are on the Hub already, or None.
    """

    folder: Path
    checkpoint: Checkpoint
    exam: Exam
    card: Card
    made: Mapping[str, bytes]
    uploads: Uploads | None

    @property
    def names(self) -> dict[str, int]:
        """All files that will be there, with their sizes."""
        files = self.checkpoint.files
        own = {name: files.size(name) for name in files.names() if name not in (JOURNAL_NAME, UPLOADS_NAME)}
        return dict(sorted((own | {name: len(data) for name, data in self.made.items()}).items()))


def prepare(
    folder: Path,
    target: Location,
    parity: Path | None,
    *,
    force: bool,
    workers: int,
    progress: Callable[[int], Advance],
) -> Parcel:
    """Examine a folder and write its card; the Hub is asked only for shards that lie there already.

    Args:
        target: where it will be published; the revision is None for main.
        parity: the parity report, or None.
        force: publish in spite of the gate; the card says so in its first line.
        progress: told how many bytes will be hashed; gives what is told bytes hashed, and of which file.

    Raises:
        CheckFailedError: if the gate refuses and force is False.
        CheckpointError: if there is no checkpoint, or, with force, an unsound one.
        HubError: if the Hub is asked and refuses.
    """
    uploads = read_uploads(folder) if folder.is_dir() else None
    checkpoint, staged = _opened(folder, uploads, target)
    exam = examine(checkpoint, parity, uploads, staged, workers=workers, progress=progress(checkpoint.bytes))
    if exam.refusals and not force:
        raise CheckFailedError(
            f"{folder} is not published:\n" + "\n".join(f"  {refusal}" for refusal in exam.refusals[:_SHOWN]),
            hint="Mend what is named; --force-unverified publishes with a card that says so.",
        )
    checkpoint.require_sound()
    origin = converted_from(folder)
    card = build_card(checkpoint, exam, origin, target)
    made = {README_NAME: card.text.encode(), **card.pictures}
    if exam.report is not None:
        made[PARITY_NAME] = _public_report(exam.report, target.repo_id, str(origin) if origin else "")
    return Parcel(folder, checkpoint, exam, card, made, uploads)


def send(parcel: Parcel, target: Target, *, private: bool, progress: Callable[[int], Advance]) -> Published:
    """Publish what was prepared.

    Args:
        progress: told how many bytes there are; gives what is told bytes hashed or uploaded, and of which file.

    Raises:
        CheckFailedError: if the shards are staged in another repository.
        CheckpointError: if a file here changes meanwhile.
        HubError: if the Hub refuses, cannot be reached, or holds other bytes than those sent.
    """
    hub, uploads = connect(), parcel.uploads
    if uploads is not None and uploads.repo_id != target.repo_id:
        raise CheckFailedError(
            f"{parcel.folder}: its shards were uploaded to {uploads.repo_id}, expected {target.repo_id}",
            hint=f"Push it there: v4quant push {parcel.folder} {uploads.repo_id}",
        )
    make_repo(hub, target.repo_id, private=private)
    advance = progress(2 * sum(parcel.names.values()))
    contents = _contents(parcel, advance)
    branch = Branch(hub, target.repo_id, uploads.branch if uploads else branch_name(target, contents))

    def unchanged() -> None:
        for content in contents:
            if isinstance(content.data, Path):
                parcel.checkpoint.files.require_unchanged(content.file.name)

    return publish(hub, target, branch, contents, unchanged, advance)


def _opened(folder: Path, uploads: Uploads | None, target: Location) -> tuple[Checkpoint, RemoteFiles | None]:
    """The checkpoint of a folder, its shards read from the Hub where they are there.

    Raises:
        CheckFailedError: if it is an unfinished, damaged or sharded one.
        CheckpointError: if the folder never was one.
    """
    files = Files(folder)
    if SHARDS_NAME in files:
        raise CheckFailedError(
            f"{folder} is not published:\n  it is sharded over ranks, expected whole tensors",
            hint=f"Publish the checkpoint that it was made from, or put it together: v4quant merge {folder} OUT",
        )
    staged = _staged(uploads, target, connect()) if uploads else None
    try:
        if uploads is None or staged is None:
            return open_checkpoint(folder), staged
        return open_source(MixedFiles(files, staged, set(uploads.shards))), staged
    except CheckpointError as error:
        if INDEX_NAME in files or JOURNAL_NAME in files:
            raise CheckFailedError(f"{folder} is not published:\n  {error}", hint=error.hint) from error
        raise


def _staged(uploads: Uploads, target: Location, hub: Hub) -> RemoteFiles:
    """The branch with the shards; once they are published and it is gone, the place where all can see them."""
    branch = Branch(hub, uploads.repo_id, uploads.branch)
    files = open_remote(branch.location if branch.exists() else Location(uploads.repo_id, target.revision), hub)
    prefetch_checkpoint(files)
    return files


def _contents(parcel: Parcel, advance: Advance) -> list[Content]:
    """Every file with its hashes: here, made, or there already."""
    files, uploads = parcel.checkpoint.files, parcel.uploads
    contents = [content_of_bytes(name, data) for name, data in parcel.made.items()]
    for name in parcel.names:
        if name in parcel.made:
            continue
        if uploads is not None and name in uploads.shards:
            shard = uploads.shards[name]
            contents.append(Content(RemoteFile(name, shard.size, shard.sha256, _NO_GIT_HASH), None))
        else:
            contents.append(content_of_file(files, name, parcel.folder / name, advance))
    return contents


def _public_report(report: Mapping[str, Any], repo_id: str, source: str) -> bytes:
    """The parity report without the paths of the machine that it was made on."""
    evidence = dict(report["evidence"])
    for side, place in (("candidate", repo_id), ("reference", source)):
        if isinstance(evidence.get(side), dict):
            evidence[side] = evidence[side] | {"path": place}
    outputs = evidence.get("reference_outputs")
    if isinstance(outputs, dict) and isinstance(outputs.get("path"), str):
        evidence["reference_outputs"] = outputs | {"path": Path(outputs["path"]).name}
    if isinstance(evidence.get("tokens_from"), str):
        evidence["tokens_from"] = Path(evidence["tokens_from"]).name
    public = {key: value for key, value in report.items() if key != "report"} | {"evidence": evidence}
    return json.dumps(public, indent=1).encode() + b"\n"
