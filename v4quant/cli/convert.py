"""`v4quant convert`: one stored form into another, streamed, proved tensor by tensor, resumable."""

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v4quant.checkpoint.layout import Packing
from v4quant.cli._hub_run import begin_hub_run, note_origin, pinned_source
from v4quant.cli._options import AnySource, DryRun, JsonMode, MaxWorkers, Out, Overwrite, parse_size
from v4quant.cli._output import Output, decimal_bytes, plural
from v4quant.cli._progress import Advance, byte_progress
from v4quant.cli._source import open_source, remote_facts
from v4quant.errors import UsageError

if TYPE_CHECKING:
    from v4quant.checkpoint.apply import ApplyReport
    from v4quant.checkpoint.plan import Operation, Plan
    from v4quant.checkpoint.process_group import ProcessGroup
    from v4quant.hub.stream import HubRun


def convert(
    src: AnySource,
    out: Out,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="native, fp8, bf16 or base.", show_default=False)],
    dry_run: DryRun = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest output file, decimal, with unit.")
    ] = "5GB",
    pack: Annotated[
        Packing,
        typer.Option(help="Files: one block each, as released; filled up to --max-shard-size; or one for everything."),
    ] = Packing.LAYER,
    max_workers: MaxWorkers = 4,
    allow_rounding: Annotated[bool, typer.Option("--allow-rounding", help="Accept tensors that lose bits.")] = False,
    like: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="Reuse this checkpoint's block scales wherever they fit the values."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO_ID", help="Upload each finished shard to a branch of this repository, and remove it."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: make a private repository.")] = False,
    overwrite: Overwrite = False,
    json_mode: JsonMode = False,
) -> None:
    """Convert a checkpoint and prove every tensor; run the same command again to continue after an interruption.

    To the format that it has already, it packs anew: files that stay as they are become hard links. Under torchrun the
    processes, on one machine or many with a shared folder, share the files out.

    \b
    v4quant convert DeepSeek-V4-Flash flash-fp8 --to fp8
    v4quant convert DeepSeek-V4-Flash flash-bf16 --to bf16 --dry-run
    v4quant convert flash-bf16 flash-again --to native --like DeepSeek-V4-Flash
    v4quant convert hf://deepseek-ai/DeepSeek-V4-Flash flash-fp8 --to fp8 --push me/DeepSeek-V4-Flash-FP8
    torchrun --nproc-per-node 4 -m v4quant convert DeepSeek-V4-Flash flash-fp8 --to fp8
    """
    # The engine loads numpy and numba, which `v4quant --help` need not wait for.
    from v4quant.checkpoint.plan import make_plan
    from v4quant.checkpoint.process_group import ProcessGroup
    from v4quant.checkpoint.side_files import files_left_behind
    from v4quant.formats import format_named

    with ProcessGroup.from_environment() as group, group.ending_together():
        output = Output(json_mode, silent=not group.is_first)
        target = format_named(to)
        max_shard_bytes = parse_size(max_shard_size, "--max-shard-size")
        original = open_source(like) if like else None
        source = open_source(src if overwrite else pinned_source(src, out))
        plan = make_plan(source, target, max_shard_bytes=max_shard_bytes, packing=pack, like=original)
        run = begin_hub_run(plan, out, src, push, private=private)
        if run is not None and group.size > 1:
            raise UsageError("torchrun shares out what is local, expected one process from or to the Hub")
        if dry_run:
            _report_plan(output, plan, out, max_workers, run, overwrite=overwrite)
            group.barrier()
            return
        _apply(output, plan, out, group, run, workers=max_workers, allow_rounding=allow_rounding, overwrite=overwrite)
        for name in files_left_behind(plan.source):
            output.note(f"not copied, as it may hold weights in another form: {name}")
        if run is not None and run.branch is not None:
            output.note(f"next: v4quant parity {run.branch.location} --against {plan.source.where} --report report")
            output.note(f"then: v4quant push {out} {push} --parity report/parity.json")
        else:
            output.note(f"next: v4quant verify {out} --against {plan.source.where}")


def _apply(
    output: Output, plan: "Plan", out: Path, group: "ProcessGroup", run: "HubRun | None", **options: Any
) -> None:
    """Carry the plan out and report; options are those of `apply`."""
    from v4quant.checkpoint.apply import apply
    from v4quant.checkpoint.certificate import RoundingRefusedError

    start = time.monotonic()
    with ExitStack() as stack:

        def begin(done: int) -> Advance:
            # Only now is it certain that the output folder may be written.
            _print_plan(output, plan)
            if run is None and group.is_first:
                note_origin(Path(plan.source.where), out)
            return stack.enter_context(byte_progress(plan.bytes_read, "convert", done, silent=not group.is_first))

        try:
            if run is not None:
                stack.callback(run.close)
            report = apply(run.plan if run else plan, out, progress=begin, group=group, sink=run, **options)
        except RoundingRefusedError as refusal:
            # The process that has found it speaks, whichever that is.
            worst = [record.to_json() for record in refusal.worst]
            Output(output.json_mode).result(_plan_json(plan) | {"would_round": worst})
            raise
    _report(output, plan, report, time.monotonic() - start, run)


def _report_plan(
    output: Output, plan: "Plan", out: Path, workers: int, run: "HubRun | None", *, overwrite: bool
) -> None:
    """What --dry-run says."""
    from v4quant.checkpoint.linked_files import linkable
    from v4quant.checkpoint.output import disk_errors, free_bytes, require_free
    from v4quant.checkpoint.reader import JOURNAL_NAME
    from v4quant.checkpoint.run_folder import require_apart

    require_apart(out, plan.folders)
    with disk_errors(out):
        is_unfinished = (out / JOURNAL_NAME).exists()
    if not is_unfinished:
        require_free(out, overwrite=overwrite)
    free, peak = free_bytes(out), plan.peak_memory_bytes(workers)
    links = linkable(plan.source.files, out, plan.unchanged_files)
    disk, spool = (run.disk_bytes, run.spool_bytes) if run else (plan.disk_bytes, 0)
    disk -= plan.linked_bytes(links)
    risky = [operation for operation in plan if operation.risk]
    _print_plan(output, plan)
    output.line(f"memory: at most {decimal_bytes(peak)} with {plural(workers, 'worker')}")
    passing = f" at most, {decimal_bytes(spool)} of it for source shards that pass through" if spool else ""
    output.line(f"disk: needs {decimal_bytes(disk)}{passing}, {decimal_bytes(free)} free")
    if links:
        output.line(f"stays as it is: {plural(len(links), 'file')}, which will be hard links to the source's")
    if risky:
        output.line(f"may round (checked value by value, refused without --allow-rounding): {len(risky):,} weights")
        for risk, count in Counter(operation.risk for operation in risky).items():
            output.line(f"  {plural(count, 'weight')} {risk}, such as {_first_with(risky, risk)}")
    else:
        output.line("may round: nothing, but at the very edge of BF16's range, which is checked")
    output.result(
        _plan_json(plan)
        | {
            "peak_memory_bytes": peak,
            "disk_bytes": disk,
            "spool_bytes": spool,
            "disk_free_bytes": free,
            "shards": len(plan.shards),
            "linked_files": len(links),
            "actions": dict(Counter(operation.action for operation in plan)),
            "may_round": [{"tensor": operation.name, "when": operation.risk} for operation in risky],
        }
        | remote_facts(output, plan.source)
    )
    if free < disk:
        output.note(f"warning: the disk of {out} is {decimal_bytes(disk - free)} too small")
    output.note("next: run it without --dry-run")


def _first_with(operations: Iterable["Operation"], risk: str) -> str:
    return next(operation.name for operation in operations if operation.risk == risk)


def _plan_json(plan: "Plan") -> dict[str, Any]:
    return {
        "format": plan.format.name,
        "tensors": plan.tensors,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
    }


def _print_plan(output: Output, plan: "Plan") -> None:
    shards = plural(len(plan.shards), "shard")
    output.line(f"{plan.source.release}: {plan.source.scheme.name} -> {plan.format.name}, {shards}")
    actions: dict[str, list[Operation]] = {}
    for operation in plan:
        actions.setdefault(operation.action, []).append(operation)
    for action, operations in actions.items():
        read = sum(operation.bytes_read for operation in operations)
        written = sum(operation.bytes_written for operation in operations)
        output.line(f"{action:>16}: {len(operations):>7,} x  {decimal_bytes(read):>10} -> {decimal_bytes(written)}")
    output.line(f"reads {decimal_bytes(plan.bytes_read)}, writes {decimal_bytes(plan.bytes_written)}")


def _report(output: Output, plan: "Plan", report: "ApplyReport", seconds: float, run: "HubRun | None") -> None:
    """What a finished conversion says."""
    from v4quant.checkpoint.certificate import verdict_counts

    if report.resumed_shards:
        output.line(f"continued: {plural(report.resumed_shards, 'shard')} had been finished before")
    counts = verdict_counts(report.verdicts)
    output.line(
        f"{plural(plan.tensors, 'tensor')} in {seconds:.1f} s: {counts['bit_identical']:,} bit-identical, "
        f"{counts['value_exact']:,} value-exact, {counts['rounded']:,} rounded"
    )
    if report.linked_files:
        links = plural(report.linked_files, "file")
        output.line(f"{links} unchanged, hard links to the source: what is edited in place in one is edited in both")
    for record in report.worst:
        output.line(f"  rounded: {record.describe_error()}")
    output.line(f"certificate: {report.certificate}")
    output.result(
        _plan_json(plan)
        | {"seconds": round(seconds, 3), **counts, "certificate": str(report.certificate)}
        | {"resumed_shards": report.resumed_shards, "linked_files": report.linked_files}
        | remote_facts(output, plan.source)
        | ({"pushed_to": str(run.branch.location)} if run and run.branch else {})
    )
