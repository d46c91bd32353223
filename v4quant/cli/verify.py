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
    from v4quant.checkpoint.verify_report import VerifyReport

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

    Under torchrun the processes share the tensors out.

    \b
    v4quant verify flash-fp8
    v4quant verify flash-fp8 --against DeepSeek-V4-Flash
    torchrun --nproc-per-node 4 -m v4quant verify flash-fp8 --against DeepSeek-V4-Flash
    """
    from v4quant.checkpoint.certificate import CERTIFICATE_NAME, verdict_counts
    from v4quant.checkpoint.process_group import ProcessGroup
    from v4quant.checkpoint.reader import open_checkpoint

    with ProcessGroup.from_environment() as group, group.ending_together():
        # This loads torch, which `v4quant --help` need not wait for.
        from v4quant.checkpoint.verify import verify_against, verify_hashes

        output = Output(json_mode, silent=not group.is_first)
        checkpoint = open_checkpoint(out)
        source = open_checkpoint(against) if against else None
        start = time.monotonic()
        passes = 2 if source and CERTIFICATE_NAME in checkpoint.files else 1
        with byte_progress(passes * checkpoint.bytes, "verify", silent=not group.is_first) as advance:
            if source is None:
                report = verify_hashes(checkpoint, workers=max_workers, progress=advance, group=group)
            else:
                report = verify_against(checkpoint, source, workers=max_workers, progress=advance, group=group)
        output.result(
            {
                "ok": report.ok,
                "tensors": len(checkpoint.tensors),
                **verdict_counts(report.verdicts),
                "mismatches": [mismatch.to_json() for mismatch in report.mismatches],
                "seconds": round(time.monotonic() - start, 3),
            }
        )
        _print_report(output, report, "values of " + str(against) if against else "certificate")
        if group.is_first and not report.ok:
            raise CheckFailedError(f"{out}: {plural(len(report.mismatches), 'mismatch')}", hint="Convert it again.")
        # The first one's verdict is everybody's.
        group.barrier()


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
