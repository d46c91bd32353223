"""`v4quant verify`: does a checkpoint still hold the bytes that were written, and the values of its source?"""

import time
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
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Checkpoint folder to verify, or a repository.", show_default=False)
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="SRC", help="Compare every value with this checkpoint; OUT may lack a certificate then."),
    ] = None,
    max_workers: MaxWorkers = 4,
    json_mode: JsonMode = False,
) -> None:
    """Re-hash a converted checkpoint against its certificate, or compare every value with its source.

    \b
    v4quant verify flash-fp8
    v4quant verify flash-fp8 --against DeepSeek-V4-Flash
    v4quant verify me/flash-fp8 --against hf://deepseek-ai/DeepSeek-V4-Flash@main
    """
    # These load torch, which `v4quant --help` need not wait for.
    from v4quant.checkpoint.certificate import CERTIFICATE_NAME, verdict_counts
    from v4quant.checkpoint.verify import verify_against, verify_hashes
    from v4quant.cli._source import open_source

    output = Output(json_mode)
    checkpoint = open_source(out)
    source = open_source(against) if against else None
    start = time.monotonic()
    passes = 2 if source and CERTIFICATE_NAME in checkpoint.files else 1
    with byte_progress(passes * checkpoint.bytes, "verify") as advance:
        if source is None:
            report = verify_hashes(checkpoint, workers=max_workers, progress=advance)
        else:
            report = verify_against(checkpoint, source, workers=max_workers, progress=advance)
    output.result(
        {
            "ok": report.ok,
            "tensors": len(checkpoint.tensors),
            **verdict_counts(report.verdicts),
            "mismatches": [mismatch.to_json() for mismatch in report.mismatches],
            "seconds": round(time.monotonic() - start, 3),
        }
    )
    _print_report(output, report, "values of " + against if against else "certificate")
    if not report.ok:
        raise CheckFailedError(f"{out}: {plural(len(report.mismatches), 'mismatch')}", hint="Convert it again.")


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
