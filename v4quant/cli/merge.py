"""`v4quant merge`: what shard wrote back into the checkpoint that it was made from."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from v4quant.cli._options import JsonMode, MaxWorkers, Out, Overwrite
from v4quant.cli._output import Output, decimal_bytes, plural
from v4quant.cli._progress import Advance, byte_progress


def merge(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder that shard wrote.", show_default=False)],
    out: Out,
    max_workers: MaxWorkers = 4,
    overwrite: Overwrite = False,
    json_mode: JsonMode = False,
) -> None:
    """Make one checkpoint of what shard wrote, every file byte for byte as it was before.

    \b
    v4quant merge flash-mp8 flash-again
    """
    # The engine loads numpy and numba, which `v4quant --help` need not wait for.
    from v4quant.checkpoint.sharding.folder import open_sharded
    from v4quant.checkpoint.sharding.merge import MergePlan, apply_merge

    output = Output(json_mode)
    plan = MergePlan(open_sharded(src))
    record, ranks, start = plan.source.record, plan.source.layout.grid.ranks, time.monotonic()
    files = len(record.weights) + len(record.files)
    with ExitStack() as stack:

        def begin(done: int) -> Advance:
            # Only now is it certain that the output folder may be written.
            output.line(f"{plural(ranks, 'rank')} -> {plural(len(record.weights), 'weight file')}")
            output.line(f"writes {decimal_bytes(plan.bytes_written)}")
            return stack.enter_context(byte_progress(plan.bytes_written, "merge", done))

        resumed = apply_merge(plan, out, workers=max_workers, overwrite=overwrite, progress=begin)
    seconds = time.monotonic() - start
    if resumed:
        output.line(f"continued: {plural(resumed, 'file')} had been finished before")
    output.line(
        f"{plural(plan.tensors, 'tensor')} in {seconds:.1f} s; {plural(files, 'file')}, each with its old sha256"
    )
    output.result(
        {
            "ranks": ranks,
            "tensors": plan.tensors,
            "bytes_written": plan.bytes_written,
            "files": files,
            "seconds": round(seconds, 3),
            "resumed_files": resumed,
        }
    )
    output.note(f"next: v4quant inspect {out}")
