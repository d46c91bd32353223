"""`v4quant verify`: does a checkpoint still hold the bytes that were written, and the values of its source?"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v4quant.cli._options import JsonMode, MaxWorkers
from v4quant.cli._output import Output, plural
from v4quant.cli._progress import byte_progress
from v4quant.cli._source import open_source
from v4quant.errors import CheckFailedError
from v4quant.hub.location import parse_location

if TYPE_CHECKING:
    from v4quant.checkpoint.process_group import ProcessGroup
    from v4quant.checkpoint.verify_report import VerifyReport

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

    Under torchrun the processes share the tensors out.

    \b
    v4quant verify flash-fp8
    v4quant verify flash-fp8 --against DeepSeek-V4-Flash
    v4quant verify me/flash-fp8 --against hf://deepseek-ai/DeepSeek-V4-Flash@main
    torchrun --nproc-per-node 4 -m v4quant verify flash-fp8 --against DeepSeek-V4-Flash
    """
    from v4quant.checkpoint.process_group import ProcessGroup

    with ProcessGroup.from_environment() as group, group.ending_together():
        output = Output(json_mode, silent=not group.is_first)
        start = time.monotonic()
        tensors, report, what = _verify(out, against, max_workers, group)
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
        if group.is_first and not report.ok:
            raise CheckFailedError(f"{out}: {plural(len(report.mismatches), 'mismatch')}", hint="Make it again.")
        # The first one's verdict is everybody's.
        group.barrier()


def _verify(out: str, against: str | None, workers: int, group: "ProcessGroup") -> tuple[int, "VerifyReport", str]:
    """Verify whatever OUT is.

    Returns:
        How many tensors it holds, what was found, and what they were compared with.
    """
    # These load torch, which `v4quant --help` need not wait for.
    from v4quant.checkpoint.certificate import CERTIFICATE_NAME
    from v4quant.checkpoint.files import Files
    from v4quant.checkpoint.reader import open_source as open_files
    from v4quant.checkpoint.sharding.verify import is_rank_folder, verify_rank, verify_sharded
    from v4quant.checkpoint.sharding.whole import WholeFiles
    from v4quant.checkpoint.verify import verify_against, verify_hashes
    from v4quant.checkpoint.verify_report import VerifyReport

    silent = not group.is_first
    if against is None and parse_location(out) is None and is_rank_folder(files := Files(Path(out))):
        part = open_files(files, is_part=True)
        with byte_progress(part.bytes, "verify", silent=silent) as advance:
            report = VerifyReport() if silent else verify_rank(part, workers=workers, progress=advance)
            return len(part.tensors), report, "certificate"
    checkpoint = open_source(out)
    source = open_source(against) if against else None
    what = f"values of {against}" if against else "certificate"
    passes = 2 if source and CERTIFICATE_NAME in checkpoint.files else 1
    if isinstance(checkpoint.files, WholeFiles):
        passes, what = passes + bool(source), what if against else "record of the checkpoint that was sharded"
    with byte_progress(passes * checkpoint.bytes, "verify", silent=silent) as advance:
        if isinstance(checkpoint.files, WholeFiles):
            # Ranks are compared with each other, so one process looks at all of them.
            report = VerifyReport()
            if group.is_first:
                report = verify_sharded(checkpoint, checkpoint.files.folder, source, workers=workers, progress=advance)
        elif source is None:
            report = verify_hashes(checkpoint, workers=workers, progress=advance, group=group)
        else:
            report = verify_against(checkpoint, source, workers=workers, progress=advance, group=group)
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
