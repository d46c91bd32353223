"""`v4quant shard`: a checkpoint into tensor-parallel files for DeepSeek's inference code, or into folders of ranks."""

import time
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v4quant.checkpoint.layout import Packing
from v4quant.cli._options import DryRun, JsonMode, MaxWorkers, Out, Overwrite, Source, parse_size
from v4quant.cli._output import Output, decimal_bytes, plural
from v4quant.cli._progress import Advance, byte_progress
from v4quant.errors import UsageError

if TYPE_CHECKING:
    from v4quant.checkpoint.sharding.rules import Layout
    from v4quant.checkpoint.sharding.shard import ShardPlan


class Experts(StrEnum):
    """How rank files hold routed experts."""

    STORED = "stored"
    FP8 = "fp8"


def _ranks(text: str) -> Any:
    return typer.Option(metavar="N", help=text, min=1, max=1024, show_default=False)


def shard(
    src: Source,
    out: Out,
    tp: Annotated[int | None, _ranks("Tensor-parallel shares of dense parts.")] = None,
    ep: Annotated[int | None, _ranks("Copies of them that share out the experts further; writes rank folders.")] = None,
    pp: Annotated[int | None, _ranks("Pipeline stages of layers; writes rank folders.")] = None,
    experts: Annotated[
        Experts, typer.Option(help="Routed experts as they are stored, or FP4 cast to FP8 where that is exact.")
    ] = Experts.STORED,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file in a rank folder, decimal, with unit.")
    ] = "5GB",
    pack: Annotated[
        Packing,
        typer.Option(help="Files in a rank folder: a block each, filled to the size, or one."),
    ] = Packing.LAYER,
    explain: Annotated[
        bool, typer.Option("--explain", help="List which --tp work and what forbids the others; writes nothing.")
    ] = False,
    dry_run: DryRun = False,
    max_workers: MaxWorkers = 4,
    overwrite: Overwrite = False,
    json_mode: JsonMode = False,
) -> None:
    """Write the tensor-parallel files that DeepSeek's inference code loads, or with --ep or --pp a folder a rank.

    SRC may be sharded itself: any split becomes any other. What merge needs lies beside the ranks.

    \b
    v4quant shard DeepSeek-V4-Flash flash-mp8 --tp 8
    v4quant shard DeepSeek-V4-Flash flash-mp4 --tp 4 --experts fp8
    v4quant shard DeepSeek-V4-Pro pro-ranks --tp 2 --ep 8 --pp 4
    v4quant shard flash-mp8 flash-ep8 --tp 1 --ep 8
    v4quant shard DeepSeek-V4-Pro pro-mp16 --explain
    """
    # The engine loads numpy and numba, which `v4quant --help` need not wait for.
    from v4quant.checkpoint.reader import open_checkpoint
    from v4quant.checkpoint.sharding.grid import MAX_RANKS, Grid
    from v4quant.checkpoint.sharding.rules import Layout
    from v4quant.checkpoint.sharding.shard import apply_shard, plan_shard
    from v4quant.checkpoint.side_files import files_left_behind

    output = Output(json_mode)
    layout = Layout.DEEPSEEK if ep is None and pp is None else Layout.RANKS
    if explain:
        _explain(output, src, layout, ep or 1, pp or 1)
        return
    if tp is None and layout is Layout.DEEPSEEK:
        raise UsageError("--tp is missing, expected the number of ranks", hint="See which work with --explain.")
    grid = Grid(tp or 1, ep or 1, pp or 1)
    if grid.ranks > MAX_RANKS:
        raise UsageError(f"{grid} is {grid.ranks:,} ranks, expected at most {MAX_RANKS:,}")
    if layout is Layout.DEEPSEEK and pack is not Packing.LAYER:
        raise UsageError("--pack is for rank folders, with --ep or --pp; DeepSeek's layout has one file a rank")
    if layout is Layout.RANKS and experts is Experts.FP8:
        raise UsageError(
            "--experts fp8 is for DeepSeek's layout, --tp N alone; rank folders hold experts as they are stored",
            hint=f"Convert the checkpoint first: v4quant convert {src} OUT --to fp8",
        )
    limit = parse_size(max_shard_size, "--max-shard-size")
    is_fp8 = experts is Experts.FP8
    source = open_checkpoint(src)
    plan = plan_shard(source, grid, layout, fp8_experts=is_fp8, max_shard_bytes=limit, packing=pack)
    if dry_run:
        _report_plan(output, plan, out, max_workers, overwrite=overwrite)
        return
    start = time.monotonic()
    with ExitStack() as stack:

        def begin(done: int) -> Advance:
            # Only now is it certain that the output folder may be written.
            _print_plan(output, plan)
            return stack.enter_context(byte_progress(plan.bytes_read, "shard", done))

        report = apply_shard(plan, out, workers=max_workers, overwrite=overwrite, progress=begin)
    seconds = time.monotonic() - start
    if report.resumed_files:
        output.line(f"continued: {plural(report.resumed_files, 'file')} had been done before")
    output.line(f"{plural(plan.tensors, 'tensor')} in {plural(plan.run.grid.ranks, 'rank')}, {seconds:.1f} s")
    if report.rounded:
        output.line(f"rounded to BF16, as the layout wants it: {report.rounded:,} wo_a; the extra file has their FP8")
    output.result(
        _plan_json(plan)
        | {"seconds": round(seconds, 3), "rounded": report.rounded, "resumed_files": report.resumed_files}
    )
    for name in files_left_behind(plan.source):
        output.note(f"not kept, as it may hold weights in another form: {name}")
    output.note(f"next: v4quant merge {out} OUT gives back the checkpoint, byte for byte")


def _explain(output: Output, src: Path, layout: "Layout", ep: int, pp: int) -> None:
    """What --explain says."""
    from v4quant.checkpoint.reader import open_checkpoint
    from v4quant.checkpoint.sharding.grid import Grid
    from v4quant.checkpoint.sharding.rules import MOST_RANKS_LISTED, Layout, obstacles

    source = open_checkpoint(src)
    source.require_sound()
    sizes: list[dict[str, Any]] = []
    rest = "" if layout is Layout.DEEPSEEK else f" with --ep {ep} --pp {pp}"
    output.line(f"{source.release}, {source.scheme.name}{rest}")
    for tp in range(1, MOST_RANKS_LISTED + 1):
        found = obstacles(source, Grid(tp, ep, pp), layout)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        output.line(f"--tp {tp:<3} {f'no: {found[0]}{more}' if found else 'works'}")
        forbidden_by = [{"tensor": obstacle.tensor, "reason": obstacle.reason} for obstacle in found]
        sizes.append({"ranks": tp * ep * pp, "tp": tp, "works": not found, "forbidden_by": forbidden_by})
    working = [size["tp"] for size in sizes if size["works"]]
    output.line(f"these work: {', '.join(map(str, working)) or 'none'}")
    output.result({"works": working, "sizes": sizes})


def _report_plan(output: Output, plan: "ShardPlan", out: Path, workers: int, *, overwrite: bool) -> None:
    """What --dry-run says."""
    from v4quant.checkpoint.output import disk_errors, free_bytes, require_free
    from v4quant.checkpoint.reader import JOURNAL_NAME
    from v4quant.checkpoint.run_folder import require_apart

    require_apart(out, [plan.source.where])
    with disk_errors(out):
        is_unfinished = (out / JOURNAL_NAME).exists()
    if not is_unfinished:
        require_free(out, overwrite=overwrite)
    free, peak = free_bytes(out), plan.peak_memory_bytes(workers)
    _print_plan(output, plan)
    output.line(f"memory: at most {decimal_bytes(peak)} with {plural(workers, 'worker')}")
    output.line(f"disk: needs {decimal_bytes(plan.disk_bytes)}, {decimal_bytes(free)} free")
    output.result(
        _plan_json(plan) | {"peak_memory_bytes": peak, "disk_bytes": plan.disk_bytes, "disk_free_bytes": free}
    )
    if free < plan.disk_bytes:
        output.note(f"warning: the disk of {out} is {decimal_bytes(plan.disk_bytes - free)} too small")
    output.note("next: run it without --dry-run")


def _plan_json(plan: "ShardPlan") -> dict[str, Any]:
    return {
        "ranks": plan.run.grid.ranks,
        "layout": str(plan.run.layout),
        "grid": {"tp": plan.run.grid.tp, "ep": plan.run.grid.ep, "pp": plan.run.grid.pp},
        "tensors": plan.tensors,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "experts": "fp8" if plan.run.fp8_experts else "stored",
    }


def _print_plan(output: Output, plan: "ShardPlan") -> None:
    layout, run = plan.layout, plan.run
    experts = ", FP4 experts as FP8" if run.fp8_experts else ""
    grid = "" if len(layout.ranks[0]) == 1 and run.grid.ranks == run.grid.tp else f" ({run.grid})"
    output.line(f"{plan.source.release}: {plan.source.scheme.name} -> {plural(run.grid.ranks, 'rank')}{grid}{experts}")
    for files in layout.ranks:
        name = files[0].name.rpartition("/")[0] or files[0].name
        _print_file(output, name, sum(len(f.entries) for f in files), sum(f.file_bytes for f in files))
    _print_file(output, layout.extra.name, len(layout.extra.entries), layout.extra.file_bytes)
    output.line(f"reads {decimal_bytes(plan.bytes_read)}, writes {decimal_bytes(plan.bytes_written)}")


def _print_file(output: Output, name: str, tensors: int, size: int) -> None:
    output.line(f"{name:>30}: {tensors:>7,} x  {decimal_bytes(size):>10}")
