"""A source as the user names it, opened: a local folder, or a repository on the Hub, of which only headers are read."""

from pathlib import Path

from v4quant.checkpoint.reader import Checkpoint, open_checkpoint
from v4quant.checkpoint.reader import open_source as open_files
from v4quant.cli._output import Output, decimal_bytes
from v4quant.hub.location import PREFIX, parse_location


def open_source(text: str) -> Checkpoint:
    """Open a checkpoint, wherever it is.

    Args:
        text: a folder, REPO_ID or hf://REPO_ID@REVISION.

    Raises:
        UsageError: if the text is neither, or the config is not that of a supported model.
        CheckpointError: if there is no sound V4 checkpoint.
        HubError: if the Hub refuses or cannot be reached.
    """
    location = parse_location(text)
    if location is None:
        return open_checkpoint(Path(text))
    from v4quant.hub.remote_files import open_remote, prefetch_checkpoint

    files = open_remote(location)
    prefetch_checkpoint(files)
    return open_files(files)


def lies_in(path: Path, source: str) -> bool:
    """True if a path lies in a source that is a local folder."""
    return parse_location(source) is None and path.resolve().is_relative_to(Path(source).resolve())


def remote_facts(output: Output, checkpoint: Checkpoint) -> dict[str, object]:
    """Where a remote checkpoint was read and what that cost, for JSON; says it for people too. Nothing of a folder."""
    if not checkpoint.where.startswith(PREFIX):
        return {}
    from v4quant.hub.remote_files import RemoteFiles

    files = checkpoint.files
    assert isinstance(files, RemoteFiles)
    output.line(f"read {decimal_bytes(files.bytes_fetched)} of {files.where}")
    return {"repo": files.listing.repo_id, "commit": files.listing.commit, "bytes_fetched": files.bytes_fetched}
