"""`v4quant download`: a repository, or part of it, into a folder, every file re-hashed."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from v4quant.cli._options import JsonMode, MaxWorkers
from v4quant.cli._output import Output, decimal_bytes, plural
from v4quant.cli._progress import Advance, byte_progress
from v4quant.errors import UsageError
from v4quant.hub.location import Location, parse_location

_SHOWN = 5


def download(
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME, or hf://OWNER/NAME@REVISION.", show_default=False)
    ],
    local_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write; made if missing.", show_default=False)
    ],
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help='Only such files, "*.json"; several times for more.')
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="No such files.")] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="A-B", help="Of the layers' weight files only those of these layers.")
    ] = None,
    no_mtp: Annotated[bool, typer.Option("--no-mtp", help="No weight files that hold nothing but MTP blocks.")] = False,
    max_workers: MaxWorkers = 8,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that no download of this repository put there.")
    ] = False,
    json_mode: JsonMode = False,
) -> None:
    """Download a repository, check every file's hash, and repair what is corrupt; run it again to continue or to check.

    \b
    v4quant download deepseek-ai/DeepSeek-V4-Flash --local-dir flash
    v4quant download hf://deepseek-ai/DeepSeek-V4-Flash@main --local-dir part --layers 0-3 --no-mtp
    v4quant download deepseek-ai/DeepSeek-V4-Flash --local-dir small --exclude "*.safetensors"
    """
    from v4quant.hub.download import download as run_download
    from v4quant.hub.select import Selection, parse_layers

    output = Output(json_mode)
    selection = Selection(
        include or (), exclude or (), parse_layers(layers) if layers is not None else None, not no_mtp
    )
    with ExitStack() as stack:

        def begin(total: int) -> Advance:
            return stack.enter_context(byte_progress(total, "download"))

        report = run_download(
            _location(repo_id), local_dir, selection, workers=max_workers, overwrite=overwrite, progress=begin
        )
    output.line(
        f"{plural(len(report.names), 'file')}, {decimal_bytes(report.bytes)}, each with the hash that the Hub lists: "
        f"{len(report.names) - len(report.fetched):,} were there, {len(report.fetched):,} fetched"
    )
    for name in report.repaired[:_SHOWN]:
        output.line(f"  replaced, as its hash was another: {name}")
    output.result(
        {
            "files": len(report.names),
            "bytes": report.bytes,
            "verified": len(report.names),
            "fetched": len(report.fetched),
            "repaired": sorted(report.repaired),
            "repo": report.origin.repo_id,
            "commit": report.origin.commit,
        }
    )
    if selection.is_partial:
        output.note("a part of the repository: inspect will miss what was left out")
    output.note(f"next: v4quant inspect {local_dir}")


def _location(text: str) -> Location:
    """The repository; here a name is never a folder.

    Raises:
        UsageError: if it is no repository.
    """
    location = parse_location(text if text.startswith("hf://") else f"hf://{text}")
    if location is None:
        raise UsageError(f"{text}: is no repository")
    return location
