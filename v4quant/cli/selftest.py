"""`v4quant selftest`: which check catches which corruption, shown on the user's own checkpoint."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v4quant.cli._options import JsonMode
from v4quant.cli._output import Output, plural
from v4quant.cli._progress import layer_progress
from v4quant.errors import CheckFailedError, UsageError

if TYPE_CHECKING:
    from v4quant.parity.selftest.corruption import Corruption
    from v4quant.parity.selftest.table import Row


def selftest(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder; only read.", show_default=False)],
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Plant this corruption alone; may be repeated.")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for small copies, removed at the end. [a temporary one]"),
    ] = None,
    json_mode: JsonMode = False,
) -> None:
    """Plant corruptions in small copies of a checkpoint's own tensors, and show which check catches each.

    \b
    v4quant selftest DeepSeek-V4-Flash
    v4quant selftest DeepSeek-V4-Flash --only attn-sink-zero --only tid2eid-bf16
    """
    # torch loads here, so that `v4quant --help` need not wait for it.
    from v4quant.checkpoint.reader import open_checkpoint
    from v4quant.parity.selftest.forward import ForwardCheck
    from v4quant.parity.selftest.table import false_alarms, run_selftest, sound_folder, table_json

    output = Output(json_mode)
    corruptions = _chosen(only or [])
    checkpoint = open_checkpoint(folder)
    checkpoint.require_sound()
    if work is not None and work.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{work}: lies in the checkpoint that is read", hint="Choose a folder outside of it.")
    with tempfile.TemporaryDirectory(prefix="v4quant-selftest-") as temporary:
        place = work or Path(temporary)
        with ForwardCheck(sound_folder(place)) as check, layer_progress(len(corruptions) + 1, "selftest") as done:
            rows = run_selftest(
                checkpoint, place, check, lambda _, __, name: done(name), corruptions=tuple(corruptions)
            )
    output.result(table_json(rows))
    _print_table(output, rows)
    if alarms := false_alarms(rows):
        raise CheckFailedError(
            f"{', '.join(alarms)} complained about a copy without a fault, so the table proves nothing",
            hint="This is a defect of v4quant; please report it.",
        )


def _chosen(names: list[str]) -> list["Corruption"]:
    from v4quant.parity.selftest.corruptions import CORRUPTIONS

    unknown = [name for name in names if name not in CORRUPTIONS]
    if unknown:
        raise UsageError(
            f"--only is {unknown[0]!r}, expected one of {', '.join(CORRUPTIONS)}",
            hint="Leave the option out to plant all of them.",
        )
    return [CORRUPTIONS[name] for name in dict.fromkeys(names)] if names else list(CORRUPTIONS.values())


def _print_table(output: Output, rows: list["Row"]) -> None:
    from v4quant.parity.selftest.table import CHECKS, caught_counts, planted

    width = max(len(row.name) for row in rows)
    output.line(f"{'corruption':{width}}  inspect  verify  parity  caught by")
    for row in rows:
        if row.skipped:
            continue
        cells = [finding is not None and finding.caught for finding in map(row.finding, CHECKS)]
        marks = [("caught" if cell else "-").ljust(len(check)) for cell, check in zip(cells, CHECKS, strict=True)]
        by = ", ".join(row.caught_by) or ("nothing, as it should be" if row.is_control else "NONE: blind")
        output.line(f"{row.name:{width}}  {marks[0]}  {marks[1]}  {marks[2]}  {by}")
    counts, found = caught_counts(rows), planted(rows)
    output.line(
        f"{plural(len(found), 'corruption')} planted: inspect catches {counts['inspect']}, verify {counts['verify']}, "
        f"parity {counts['parity']}"
    )
    for row in found:
        if not row.caught_by:
            output.line(f"blind: {row.name}: {row.what}")
        elif row.caught_by == ["verify"] and row.parity is not None:
            output.line(f"parity does not see {row.name}: {row.parity.reason}")
    for row in rows:
        if row.skipped:
            output.line(f"not planted: {row.name}: {row.skipped}")
