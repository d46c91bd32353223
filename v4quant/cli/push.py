"""`v4quant push`: publish a checkpoint that has passed, whole or not at all."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from v4quant.cli._options import JsonMode, MaxWorkers
from v4quant.cli._output import Output, decimal_bytes, plural
from v4quant.cli._progress import Advance, byte_progress
from v4quant.errors import UsageError
from v4quant.hub.location import require_repo_id, require_revision


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder to publish.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub.", show_default=False)],
    parity: Annotated[
        Path | None,
        typer.Option(
            metavar="REPORT.json", help="parity.json of this very checkpoint; without it nothing is published."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="The branch that shows the result.")] = "main",
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead; whoever merges it makes it visible.")
    ] = False,
    commit_message: Annotated[str, typer.Option(metavar="TEXT", help="Of the commit. [what is published]")] = "",
    force_unverified: Annotated[
        bool,
        typer.Option("--force-unverified", help="Publish what did not pass; the first line of the card says so."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print card and files, send nothing.")] = False,
    max_workers: MaxWorkers = 4,
    json_mode: JsonMode = False,
) -> None:
    """Publish a checkpoint with a model card: only if its bytes fit certificate and parity report, and all at once.

    \b
    v4quant push flash-fp8 me/DeepSeek-V4-Flash-FP8 --parity report/parity.json --dry-run
    v4quant push flash-fp8 me/DeepSeek-V4-Flash-FP8 --parity report/parity.json --private
    """
    # numpy and torch load here, so that `v4quant --help` need not wait for them.
    from v4quant.hub.location import Location
    from v4quant.hub.publish import Target
    from v4quant.hub.push import prepare, send

    output = Output(json_mode)
    require_repo_id(repo_id)
    require_revision(revision)
    if revision.startswith("refs/") or Location(repo_id, revision).is_commit:
        raise UsageError(f"--revision is {revision!r}, expected a branch", hint="A pull request: --create-pr.")
    if create_pr and revision != "main":
        raise UsageError("--create-pr opens a pull request to main, but --revision is given", hint="Leave one out.")
    place = Location(repo_id, None if revision == "main" else revision)
    with ExitStack() as stack:

        def checking(total: int) -> Advance:
            return stack.enter_context(byte_progress(total, "check"))

        parcel = prepare(folder, place, parity, force=force_unverified, workers=max_workers, progress=checking)
    names, total = parcel.names, sum(parcel.names.values())
    facts = {"repo": repo_id, "files": len(names), "bytes": total, "refusals": parcel.exam.refusals}
    if dry_run:
        output.line(parcel.card.text)
        for name, size in names.items():
            output.line(f"{size:>18,} B  {name}")
        output.line(f"{plural(len(names), 'file')}, {decimal_bytes(total)} would go to {repo_id}")
        sizes = [{"name": name, "bytes": size} for name, size in names.items()]
        output.result(facts | {"commit": None, "card": parcel.card.text, "file_sizes": sizes})
        output.note("next: run it without --dry-run")
        return
    message = commit_message or f"{parcel.checkpoint.release} as {parcel.checkpoint.scheme.name}"
    with ExitStack() as stack:

        def sending(count: int) -> Advance:
            return stack.enter_context(byte_progress(count, "push"))

        published = send(parcel, Target(repo_id, revision, create_pr, message), private=private, progress=sending)
    output.line(f"{plural(len(names), 'file')}, {decimal_bytes(total)}; sent in this run: {len(published.uploaded):,}")
    output.line(f"published: {published.url}")
    output.result(facts | {"commit": published.commit, "url": published.url, "uploaded": sorted(published.uploaded)})
    output.note(f"next: v4quant verify hf://{repo_id}@{published.commit}")
