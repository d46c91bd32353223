"""`v4quant verify`: does a checkpoint still hold the bytes that were written, and the values of its source?"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v4quant.cli._options import JsonMode, MaxWorkers
from v4quant.cli._output import Output, plural
from v4quant.cli._progress import byte_progress
from v4quant.errors import CheckFailedError

if TYPE_CHECKING:
    from v4quant.checkpoint.verify import VerifyReport

_SHOWN_MISMATCHES = 10


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Checkpoint folder to verify.", show_default=False)],
    against: Annotated[
        Path | None,
        typer.Option(metavar="SRC", help="Compare every value with this checkpoint; OUT may lack a certificate then."),
    ] = None,
    max_workers: MaxWorkers = 4,
    json_mode: JsonMode = False,
) -> None:
    """Re-hash a converted checkpoint against its certificate, or compare every value with its source.

    \b
    v4quant verify flash-fp8
    v4quant verify flash-fp8 --against DeepSeek-V4-Flash
    """
    output = Output(json_mode)
    start = time.monotonic()
    tensors, report, what = _verify(out, against, max_workers)
    from v4quant.checkpoint.certificate import verdict_counts

    output.result(
        {
            "ok": report.ok,
            "tensors": tensors,
            **verdict_counts(report.verdicts),
            "mismatches": [mismatch.to_json() for mismatch in report.mismatches],
            "seconds": round(time.monotonic() - start, 3),
        }
    )
    _print_report(output, report, what)
    if not report.ok:
        raise CheckFailedError(f"{out}: {plural(len(report.mismatches), 'mismatch')}", hint="Make it again.")


def _verify(out: Path, against: Path | None, workers: int) -> tuple[int, "VerifyReport", str]:
    """Verify whatever OUT is.

    Returns:
        How many tensors it holds, what was found, and what they were compared with.
    """
    # These load torch, which `v4quant --help` need not wait for.
    from v4quant.checkpoint.certificate import CERTIFICATE_NAME
    from v4quant.checkpoint.files import Files
    from v4quant.checkpoint.reader import open_checkpoint, open_source
    from v4quant.checkpoint.tp_verify import is_rank_folder, verify_rank, verify_sharded
    from v4quant.checkpoint.tp_whole import WholeFiles
    from v4quant.checkpoint.verify import verify_against, verify_hashes

    files = Files(out)
    if is_rank_folder(files) and against is None:
        part = open_source(files, is_part=True)
        with byte_progress(part.bytes, "verify") as advance:
            return len(part.tensors), verify_rank(part, workers=workers, progress=advance), "certificate"
    checkpoint = open_checkpoint(out)
    source = open_checkpoint(against) if against else None
    what = f"values of {against}" if against else "certificate"
    passes = 2 if source and CERTIFICATE_NAME in checkpoint.files else 1
    if isinstance(checkpoint.files, WholeFiles):
        passes, what = passes + bool(source), what if against else "record of the checkpoint that was sharded"
    with byte_progress(passes * checkpoint.bytes, "verify") as advance:
        if isinstance(checkpoint.files, WholeFiles):
            report = verify_sharded(checkpoint, checkpoint.files.folder, source, workers=workers, progress=advance)
        elif source is None:
            report = verify_hashes(checkpoint, workers=workers, progress=advance)
        else:
            report = verify_against(checkpoint, source, workers=workers, progress=advance)
    return len(checkpoint.tensors), report, what


def _print_report(output: Output, report: "VerifyReport", what: str) -> None:
    from v4quant.checkpoint.certificate import verdict_counts

    for mismatch in report.mismatches[:_SHOWN_MISMATCHES]:
        output.line(f"MISMATCH {mismatch.tensor}: {mismatch.reason}")
    if len(report.mismatches) > _SHOWN_MISMATCHES:
        output.line(f"... and {len(report.mismatches) - _SHOWN_MISMATCHES:,} more (all of them: --json)")
    counts = verdict_counts(report.verdicts)
    verdict = "ok" if report.ok else "NOT ok"
    output.line(
        f"{verdict}: {plural(sum(counts.values()), 'tensor')} as the {what}: {counts['bit_identical']:,} "
        f"bit-identical, {counts['value_exact']:,} value-exact, {counts['rounded']:,} rounded"
    )
