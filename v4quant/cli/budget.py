"""`v4quant budget`: parameters, checkpoint bytes, KV cache and FLOPs of a model, and on which GPUs it fits."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v4quant.cli._files import read_file
from v4quant.cli._options import JsonMode
from v4quant.cli._output import Output, decimal_bytes, plural
from v4quant.cli._source import open_source
from v4quant.errors import CheckpointError, OutputError, UsageError
from v4quant.hub.location import parse_location

if TYPE_CHECKING:
    from v4quant.config import V4Config
    from v4quant.encodings import Scheme

_TOKENS = re.compile(r"([0-9]{1,12})([KM]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20}
_PLOT_SUFFIXES = (".png", ".svg", ".pdf")
_WAYS = {
    "tensor_parallel": "tensor parallel: weights shared out, every sequence's cache on each GPU",
    "expert_parallel": "expert parallel: routed experts shared out, all else on each GPU; a sequence is on one",
}


def budget(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Checkpoint folder, a config.json or its folder, REPO_ID on the Hub, or hf://REPO_ID@REVISION.",
            show_default=False,
        ),
    ],
    context: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of a sequence: 4096, 128K, 1M. [all the model takes]")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences at once.", min=1, max=2**20)] = 1,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="Tell what fits: a100, h100, h20, h200, b200 or b300.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", help="How many of them. [1]", min=1, max=2**16)] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw cache and FLOPs against context: *.png, *.svg or *.pdf.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the plot's file.")] = False,
    json_mode: JsonMode = False,
) -> None:
    """Work out what a model costs, from its config: parameters, bytes, KV cache, FLOPs, against V3.2 and GQA-8.

    \b
    v4quant budget DeepSeek-V4-Pro
    v4quant budget hf://deepseek-ai/DeepSeek-V4-Pro@main
    v4quant budget DeepSeek-V4-Flash/config.json --context 128K --batch 32
    v4quant budget DeepSeek-V4-Flash --gpu h200 --gpus 8 --plot flash.png
    """
    from v4quant.budget import Load, gpu_budget
    from v4quant.budget import budget as work_out

    output = Output(json_mode)
    if gpus is not None and gpu is None:
        raise UsageError("--gpus says how many, but --gpu not of which", hint="For example: --gpu h200 --gpus 8")
    if plot is not None:
        _require_free_plot(plot, overwrite)
    config, scheme = _read(src)
    load = Load(config.max_position_embeddings if context is None else parse_tokens(context), batch)
    report = work_out(config, scheme, load)
    if gpu is not None:
        report["gpu"] = gpu_budget(config, report, gpu, gpus or 1)
    if plot is not None:
        # matplotlib takes longer to load than all the rest to run.
        from v4quant.budget.plot import write_plot

        write_plot(plot, config, report["release"], load.context)
        report["plot"] = str(plot)
    output.result(report)
    _print_report(output, report)


def parse_tokens(text: str) -> int:
    """Read a number of tokens: "4096", "128K" for 131,072, "1M" for 1,048,576.

    Raises:
        UsageError: if it is no such number.
    """
    match = _TOKENS.fullmatch(text.strip().upper().replace(",", "").replace("_", ""))
    if match is None:
        raise UsageError(f"--context is {text!r}, expected a number of tokens", hint="For example: --context 128K")
    return int(match[1]) * _UNITS[match[2]]


def _read(source: str) -> "tuple[V4Config, Scheme]":
    """The model and how it is stored: from headers where there are weights, else what config.json says."""
    from v4quant.checkpoint.files import Files
    from v4quant.checkpoint.reader import open_checkpoint
    from v4quant.config import CONFIG_NAME, MAX_CONFIG_BYTES

    if parse_location(source) is not None:
        remote = open_source(source)
        remote.require_sound()
        return remote.config, remote.scheme
    src = Path(source)
    if src.suffix == ".json" and not os.path.isdir(src):  # noqa: PTH112  Path.is_dir fails on names that are too long
        return _declared(read_file(src, MAX_CONFIG_BYTES, "a config.json", CheckpointError), str(src))
    files = Files(src)
    if any("/" not in file and file.endswith(".safetensors") for file in files.names()):
        checkpoint = open_checkpoint(src)
        if checkpoint.problems:
            raise CheckpointError(
                f"{src}: {plural(len(checkpoint.problems), 'problem')}, the first: {checkpoint.problems[0]}",
                hint=f"All of them: v4quant inspect {src}. From its config alone: v4quant budget {src}/{CONFIG_NAME}",
            )
        return checkpoint.config, checkpoint.scheme
    if CONFIG_NAME not in files:
        raise CheckpointError(
            f"{src}: has no {CONFIG_NAME}, expected a checkpoint or a config.json",
            hint="Give the folder that holds config.json, or that file.",
        )
    if files.size(CONFIG_NAME) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{src}/{CONFIG_NAME}: has {files.size(CONFIG_NAME):,} bytes, expected a config.json")
    return _declared(files.read(CONFIG_NAME), f"{src}/{CONFIG_NAME}")


def _declared(text: bytes, where: str) -> "tuple[V4Config, Scheme]":
    """What a config says; FP8 experts, whose scales it leaves open, are taken for a Base release."""
    from v4quant.config import V4Config
    from v4quant.encodings import BASE_SCHEME

    config = V4Config.load(text, where)
    return config, config.declared_scheme or BASE_SCHEME


def _require_free_plot(plot: Path, overwrite: bool) -> None:
    if plot.suffix.lower() not in _PLOT_SUFFIXES:
        raise UsageError(f"--plot is {str(plot)!r}, expected a name that ends in {', '.join(_PLOT_SUFFIXES)}")
    if plot.is_dir():
        raise OutputError(f"{plot}: is a folder, expected a file to write")
    if not plot.parent.is_dir():
        raise OutputError(f"{plot.parent}: no such folder", hint=f"Make it first: mkdir -p {plot.parent}")
    if plot.exists() and not overwrite:
        raise OutputError(f"{plot}: exists already", hint="Choose another file, or replace it with: --overwrite")


def _print_report(output: Output, report: Mapping[str, Any]) -> None:
    sequences = plural(report["batch"], "sequence")
    output.line(f"{report['release']}, stored as {report['format']}; {sequences} of {report['context']:,} tokens")
    _print_parameters(output, report)
    _print_checkpoints(output, report["checkpoints"])
    _print_cache(output, report)
    _print_flops(output, report)
    if "gpu" in report:
        _print_gpu(output, report)
    if "plot" in report:
        output.line()
        output.line(f"wrote {report['plot']}")


def _print_parameters(output: Output, report: Mapping[str, Any]) -> None:
    own, v32 = report["parameters"], report["baselines"]["v3.2"]["parameters"]
    output.line()
    output.line(f"{'parameters':<20}{'total':>22}{'active':>20}")
    for name, counts in (("this model", own), ("DeepSeek-V3.2", v32)):
        output.line(f"{name:<20}{counts['total']:>22,}{counts['active']:>20,}")
    output.line(own["convention"])
    output.line(f"with MTP {own['total_with_mtp']:,}; active with the embedding {own['active_with_embedding']:,}")


def _print_checkpoints(output: Output, checkpoints: Mapping[str, Mapping[str, Any]]) -> None:
    """A row a role, MTP blocks in one; a column a format."""
    rows: dict[str, dict[str, int]] = {}
    for name, found in checkpoints.items():
        for role, size in found["by_role"].items():
            row = rows.setdefault("MTP blocks" if role.startswith("mtp.") else role, {})
            row[name] = row.get(name, 0) + size
    rows = dict(sorted(rows.items(), key=lambda row: -max(row[1].values())))
    rows["all"] = {name: found["bytes"] for name, found in checkpoints.items()}
    output.line()
    output.line(f"{'checkpoint bytes':<20}" + "".join(f"{name:>14}" for name in checkpoints))
    for role, sizes in rows.items():
        output.line(f"{role:<20}" + "".join(f"{decimal_bytes(sizes.get(name, 0)):>14}" for name in checkpoints))


def _print_cache(output: Output, report: Mapping[str, Any]) -> None:
    kv, ratios, baselines = report["kv"], report["ratios"], report["baselines"]
    output.line()
    output.line(f"{'KV cache':<20}{'layers':>8}{'one layer':>16}{'all':>16}{'times this':>12}")
    for kind, found in kv["by_layer_kind"].items():
        if found["layers"]:
            one, all_ = decimal_bytes(found["bytes_per_layer"]), decimal_bytes(found["bytes"])
            output.line(f"{kind.upper():<20}{found['layers']:>8}{one:>16}{all_:>16}")
    output.line(f"{'one sequence':<20}{'':>24}{decimal_bytes(kv['bytes_per_sequence']):>16}{'1':>12}")
    for name, key in (("DeepSeek-V3.2", "v3.2"), ("GQA-8 in BF16", "gqa8")):
        size = decimal_bytes(baselines[key]["kv_bytes"] // report["batch"])
        output.line(f"{name:<20}{'':>24}{size:>16}{ratios[key]['kv_times_smaller']:>12.1f}")
    if report["batch"] > 1:
        output.line(f"{plural(report['batch'], 'sequence'):<20}{'':>24}{decimal_bytes(report['kv_bytes']):>16}")
    output.line(
        f"a token adds {report['kv_bytes_per_token']:,.1f} B; a sequence also has "
        f"{decimal_bytes(kv['compressor_state_bytes'])} of compressor state"
    )
    output.line(
        f"{100 * ratios['v3.2']['kv_share']:.1f} % of V3.2's cache, {100 * ratios['gqa8']['kv_share']:.2f} % of GQA-8's"
    )


def _print_flops(output: Output, report: Mapping[str, Any]) -> None:
    work, v32 = report["flops"], report["baselines"]["v3.2"]
    decode, prefill = work["decode"], work["prefill"]
    output.line()
    output.line(f"{'GFLOPs a token':<22}{'decode':>12}{'share':>9}{'prefill':>12}{'V3.2 decode':>14}")
    parts = sorted(decode["parts"], key=lambda part: -decode["parts"][part])
    for part in [*parts, *(part for part in v32["parts"] if part not in decode["parts"])]:
        own = decode["parts"].get(part)
        cells = "" if own is None else f"{own / 1e9:,.2f}"
        share = "" if own is None else f"{100 * own / decode['total']:.1f} %"
        first = "" if own is None else f"{prefill['parts'][part] / 1e9:,.2f}"
        other = f"{v32['parts'][part] / 1e9:,.2f}" if part in v32["parts"] else ""
        output.line(f"{part:<22}{cells:>12}{share:>9}{first:>12}{other:>14}".rstrip())
    for name, key, of_v32 in (("all", "total", "flops_per_token"), ("in FP8 equivalents", "fp8_equivalents", "")):
        values = (decode[key] / 1e9, prefill[key] / 1e9, v32[of_v32 or key] / 1e9)
        output.line(f"{name:<22}{values[0]:>12,.2f}{'':>9}{values[1]:>12,.2f}{values[2]:>14,.2f}")
    ratios = report["ratios"]["v3.2"]
    output.line(
        f"{100 * ratios['flops_share']:.1f} % of V3.2's, {ratios['flops_times_fewer']:.2f} times fewer "
        "(FP8 equivalents: BF16 counts 2, FP4 x FP4 counts 0.5)"
    )
    active = 2 * report["parameters"]["active"] / decode["total"]
    indexer = v32["parts"]["indexer_scores"] / v32["flops_per_token"]
    output.line(
        f"active parameters are {100 * active:.0f} % of a decode step here; "
        f"of V3.2's, {100 * indexer:.0f} % are indexer scores"
    )


def _print_gpu(output: Output, report: Mapping[str, Any]) -> None:
    gpu = report["gpu"]
    output.line()
    output.line(
        f"{gpu['gpus']} x {gpu['name']}: {decimal_bytes(gpu['memory_bytes'])} each, 90 % of it for weights and caches"
    )
    for way, meaning in _WAYS.items():
        if gpu["gpus"] == 1 and way == "expert_parallel":
            continue  # the same on one
        if gpu["gpus"] > 1:
            output.line(meaning)
        output.line(f"  {'':<8}{'weights a GPU':>15}{'fits':>6}{'longest context':>18}{'sequences at once':>20}")
        for name, ways in gpu["formats"].items():
            fit = ways[way]
            output.line(
                f"  {name:<8}{decimal_bytes(fit['weight_bytes']):>15}{'yes' if fit['fits'] else 'no':>6}"
                f"{fit['max_context']:>18,}{fit['sequences']:>20,}"
            )
    output.line(
        f"longest context: of {plural(report['batch'], 'sequence')} at once, at most what the model takes; "
        f"sequences: of {report['context']:,} tokens, on all GPUs"
    )
