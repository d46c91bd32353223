"""`v4quant synth`: a synthetic checkpoint in the true stored form of a release."""

from typing import Annotated

import typer

from v4quant.cli._options import DryRun, JsonMode, Out, Overwrite
from v4quant.cli._output import Output, decimal_bytes, plural
from v4quant.cli._progress import byte_progress
from v4quant.testing.releases import Like, Vocab, synth_config


def synth(
    out: Out,
    like: Annotated[Like, typer.Option(help="The release whose stored form to follow.", show_default=False)],
    layers: Annotated[int | None, typer.Option(metavar="N", help="Keep only the first N layers of the trunk.")] = None,
    experts: Annotated[int | None, typer.Option(metavar="N", help="Keep only N routed experts a layer.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small dimensions, every feature, under 20 MB.")] = False,
    vocab: Annotated[
        Vocab | None,
        typer.Option(help="full: every token of the release. small: 512. [small with --tiny, else full]"),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="The same seed gives the same bytes.")] = 0,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json_mode: JsonMode = False,
) -> None:
    """Write a synthetic checkpoint: a release's names, dtypes, shapes and files, with made-up weights.

    \b
    v4quant synth tiny-flash --like flash --tiny
    v4quant synth tiny-chat --like flash --tiny --vocab full
    v4quant synth one-layer --like flash --layers 1
    v4quant synth pro --like pro --dry-run
    """
    # numpy loads here, so that `v4quant --help` need not wait for it.
    from v4quant.checkpoint.output import free_bytes, require_free
    from v4quant.testing.synth import plan_synth, write_checkpoint

    output = Output(json_mode)
    config_json, scheme = synth_config(like, layers=layers, experts=experts, tiny=tiny, vocab=vocab)
    plan = plan_synth(config_json, scheme)
    report = plan.report
    if dry_run:
        require_free(out, overwrite=overwrite)
        for name, size in report.files.items():
            output.line(f"{size:>18,} B  {name}")
        output.line(f"disk needed {decimal_bytes(plan.disk_bytes)}, free {decimal_bytes(free_bytes(out))}")
    else:
        with byte_progress(report.bytes, "synth") as advance:
            write_checkpoint(out, config_json, scheme, seed, overwrite=overwrite, progress=advance)
    done = "would write" if dry_run else "wrote"
    shards = plural(len(report.files), "shard")
    output.line(f"{done} {plural(report.tensors, 'tensor')}, {decimal_bytes(report.bytes)} in {shards}: {out}")
    output.result(
        {
            "tensors": report.tensors,
            "bytes": report.bytes,
            "disk_bytes": plan.disk_bytes,
            "shards": len(report.files),
            "seed": seed,
            "files": [{"name": name, "bytes": size} for name, size in report.files.items()],
        }
    )
    output.note("next: run it without --dry-run" if dry_run else f"next: v4quant inspect {out}")
