"""`v4quant parity`: does a checkpoint still compute what the original computes?"""

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v4quant.cli._conversations import print_conversations, write_answers
from v4quant.cli._memory import peak_memory_bytes
from v4quant.cli._options import JsonMode
from v4quant.cli._output import Output, decimal_bytes, is_finite, plural
from v4quant.cli._progress import layer_progress
from v4quant.cli._ranks import device_of, processes_of
from v4quant.cli._source import lies_in, open_source
from v4quant.cli._token_source import TokenSource
from v4quant.errors import CheckFailedError, OutputError, UsageError

if TYPE_CHECKING:
    from v4quant.checkpoint.reader import Checkpoint
    from v4quant.checkpoint.sharding.rank_tensors import Sharded
    from v4quant.model.device import Device
    from v4quant.parity.compare import Task

_SHOWN_DEPARTURES = 5
_SHOWN_TENSORS = 5


def parity(
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="Checkpoint in question.", show_default=False)],
    against: Annotated[
        str | None, typer.Option(metavar="REFERENCE", help="Checkpoint to compare with.", show_default=False)
    ] = None,
    reference_outputs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with outputs that `v4quant reference` wrote, on their tokens."),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Token ids: *.jsonl, or safetensors. [built from the config]")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text, encoded by the reference's tokenizer.")
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Conversations with tools, one a line as `encode` takes it: *.jsonl."),
    ] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="With --messages: the model thinks.")] = False,
    continuation: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --messages: greedy tokens of both models' last answers. [64]", min=0),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens to build, or to take of a text. [as every path needs]", min=1),
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of the prefill; the others are decode steps. [all but 8]", min=1),
    ] = None,
    index_topk: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Let both sides pick N entries, so that short prompts have to choose.",
            min=1,
            max=2048,  # what the kernels pick
        ),
    ] = None,
    arithmetic: Annotated[
        str, typer.Option(help="release: activations rounded as in the release. stored: as each format would be run.")
    ] = "release",
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write parity.json and report.html.", show_default=False)
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(metavar="X", help="Fail above this mean KL, in nats.", min=0.0)
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(metavar="X", help="Fail below this top-1 agreement, 0 to 1.", min=0.0, max=1.0)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report that DIR holds.")] = False,
    json_mode: JsonMode = False,
) -> None:
    """Run two checkpoints layer by layer over the same tokens, and judge the difference by the reference's own noise.

    \b
    v4quant parity flash-fp8 --against DeepSeek-V4-Flash --report report
    v4quant parity flash-fp8 --against DeepSeek-V4-Flash --text prompts.txt --max-kl 0.01
    v4quant parity flash-fp8 --against DeepSeek-V4-Flash --messages agent.jsonl --thinking
    v4quant parity pro-fp8 --reference-outputs pro.safetensors
    v4quant parity flash-fp8 --against DeepSeek-V4-Flash --length 300 --index-topk 16
    v4quant parity flash-tp4 --against DeepSeek-V4-Flash
    torchrun --nproc-per-node 4 -m v4quant parity flash-tp4 --against DeepSeek-V4-Flash
    """
    # torch loads here, so that `v4quant --help` need not wait for it.
    from v4quant.checkpoint.process_group import ProcessGroup
    from v4quant.checkpoint.sharding.rank_tensors import Sharded, as_stored
    from v4quant.model.ranked import serve_rank

    with ProcessGroup.from_environment() as group, group.ending_together():
        if max_kl is not None and not math.isfinite(max_kl):
            raise UsageError(f"--max-kl is {max_kl}, expected a number")
        _require_one_reference(against, reference_outputs)
        place = device_of(device, group)
        stored = as_stored(open_source(candidate))
        with processes_of(stored, group, place) as processes:
            if processes is not None and not group.is_first:
                assert isinstance(stored, Sharded)
                serve_rank(stored, place, processes)
                result = None
            else:
                source = TokenSource(tokens, text, messages, thinking, continuation, length, prefill)
                task = _task(stored, against, reference_outputs, source, index_topk, arithmetic, place)
                task = replace(task, processes=processes)
                result = _compare(
                    task, source.answer_tokens, candidate, against, max_kl, min_top1, report, overwrite, json_mode
                )
        if result is not None:
            _fail_on(result)
        group.barrier()  # the first one's verdict is everybody's


def _compare(
    task: "Task",
    answer_tokens: int,
    candidate: str,
    against: str | None,
    max_kl: float | None,
    min_top1: float | None,
    report: Path | None,
    overwrite: bool,
    json_mode: bool,
) -> dict[str, Any]:
    """Compare, write the report, and say what came of it."""
    from v4quant.parity.compare import compare
    from v4quant.parity.result import check_gates, to_json

    output = Output(json_mode)
    if report is not None:
        _prepare_report_folder(report, [candidate, *([against] if against else [])], overwrite)
    with ExitStack() as bars:
        comparison = compare(task, lambda steps: bars.enter_context(layer_progress(steps, "parity")))
    gates = check_gates(comparison, max_kl, min_top1)
    result = to_json(task, comparison, gates)
    if result["conversations"] is not None:
        result["conversations"]["continuations"] = write_answers(task, answer_tokens)
    result["evidence"]["peak_memory_bytes"] = peak_memory_bytes()
    if report is not None:
        from v4quant.parity.report import write_report

        if is_finite(result):
            result["report"] = str(write_report(result, report))
        else:
            output.note(f"{report}: no report is written, as the candidate computes NaN or infinity")
    output.result(result)
    print_result(output, result)
    return result


def _require_one_reference(against: str | None, reference_outputs: Path | None) -> None:
    """Refuse both, or none, of what a candidate can be compared with.

    Raises:
        UsageError: if it is so.
    """
    if (against is None) == (reference_outputs is None):
        raise UsageError(
            "give what to compare with: --against REFERENCE or --reference-outputs FILE"
            if against is None
            else "--against and --reference-outputs are both given, expected one",
            hint="For example: v4quant parity flash-fp8 --against DeepSeek-V4-Flash",
        )


def _task(
    candidate: "Checkpoint | Sharded",
    against: str | None,
    reference_outputs: Path | None,
    source: TokenSource,
    index_topk: int | None,
    arithmetic: str,
    device: "Device",
) -> "Task":
    """Open what the candidate is compared with, and read or build the tokens."""
    from v4quant.model.arithmetic import Activations
    from v4quant.parity.compare import Task
    from v4quant.parity.stored import StoredOutputs

    if arithmetic not in (Activations.RELEASE, Activations.STORED):
        raise UsageError(f"--arithmetic is {arithmetic!r}, expected release or stored")
    if against is not None:
        reference: Checkpoint | StoredOutputs = open_source(against)
    else:
        assert reference_outputs is not None
        reference = StoredOutputs(reference_outputs, candidate.config)
    prompts = source.prompts(candidate, reference, index_topk)
    return Task(candidate, reference, prompts, Activations(arithmetic), device, index_topk)


def _prepare_report_folder(report: Path, sources: list[str], overwrite: bool) -> None:
    """Make the place for the report, or refuse it, before hours of work; an earlier one goes, lest it be taken for new.

    Raises:
        UsageError: if it lies in a checkpoint.
        OutputError: if it is a file, or holds something that is no report or shall not be replaced.
    """
    if any(lies_in(report, source) for source in sources):
        raise UsageError(f"{report}: lies in a checkpoint that is compared", hint="Choose a folder outside of it.")
    if report.exists() and not report.is_dir():
        raise OutputError(f"{report}: is a file, expected a folder to write")
    try:
        report.mkdir(parents=True, exist_ok=True)
        held = {path.name for path in report.iterdir()}
    except OSError as error:
        raise OutputError(f"{report}: cannot be used as a folder: {error.strerror or error}") from error
    ours = {"parity.json", "report.html"}
    if held - ours - {f"{name}.partial" for name in ours} or any((report / name).is_dir() for name in held):
        raise OutputError(f"{report}: holds other files, expected a folder for the report alone")
    if held and not overwrite:
        raise OutputError(f"{report}: holds a report already", hint="Replace it with: --overwrite")
    for name in held:
        (report / name).unlink()


def print_result(output: Output, result: dict[str, Any]) -> None:
    """The verdict and what decides it, for people."""
    from v4quant.parity.sentences import FIGURE_NAMES, describe_ranks

    logits, floor, mtp = result["logits"], result["noise_floor"], result["mtp_logits"]
    output.line(f"{result['verdict'].upper()}: {result['in_words']}")
    output.line(f"  {'':14}{'found':>10}  {'noise':>10}   (limit: {floor['margin']:g} x noise)")
    output.line(f"  {'KL mean':14}{logits['kl']['mean']:10.3g}  {floor['kl_mean']:10.3g}   nats")
    output.line(f"  {'KL max':14}{logits['kl']['max']:10.3g}  {floor['kl_max']:10.3g}   nats, not judged")
    output.line(f"  {'top-1':14}{logits['top1']:10.4f}  {floor['top1']:10.4f}")
    if mtp is not None:
        noise = max(own["mtp_logits"]["kl"]["mean"] for own in floor["variants"].values())
        output.line(f"  {'MTP KL mean':14}{mtp['kl']['mean']:10.3g}  {noise:10.3g}   nats")
    if result["conversations"] is not None:
        print_conversations(output, result["conversations"])
    worst = max(result["layers"], key=lambda layer: layer["isolated_rel_err"])
    noise = max(layer["floor"]["isolated_rel_err"] for layer in result["layers"])
    output.line(
        f"  {'layer error':14}{worst['isolated_rel_err']:10.3g}  {noise:10.3g}   isolated, largest in layer "
        f"{worst['layer']}"
    )
    for departure in result["departures"][:_SHOWN_DEPARTURES]:
        output.line(
            f"  beyond its limit, {departure['where']}: "
            f"{FIGURE_NAMES.get(departure['figure'], departure['figure'])} {departure['found']:.3g}, limit "
            f"{departure['limit']:.3g}"
        )
    if len(result["departures"]) > _SHOWN_DEPARTURES:
        output.line(f"  ... and {len(result['departures']) - _SHOWN_DEPARTURES:,} more (all of them: --json)")
    _print_attribution(output, result["attribution"])
    for difference in result["config_differences"]:
        output.line(
            f"  config.json: {difference['key']} is {difference['candidate']}, in the reference "
            f"{difference['reference']}"
        )
    for gate in result["gates"]:
        output.line(
            f"  {gate['name']} {gate['limit']:g}: found {gate['found']:.4g}, {'passed' if gate['passed'] else 'FAILED'}"
        )
    coverage, evidence = result["coverage"], result["evidence"]
    output.line(
        f"  {plural(coverage['tokens'], 'token')} in {plural(coverage['prompts'], 'prompt')}, "
        f"{plural(coverage['decode_steps'], 'decode step')}; experts seen: {coverage['experts_seen']:,} of "
        f"{coverage['experts_in_all']:,}; arithmetic: {evidence['arithmetic']['activations']}"
    )
    output.line(
        f"  {evidence['seconds']:.1f} s, read {decimal_bytes(evidence['bytes_read'])}, peak memory "
        f"{decimal_bytes(evidence['peak_memory_bytes'])}"
    )
    if ranks := evidence["candidate"]["ranks"]:
        output.line(f"  the candidate was run by {describe_ranks(ranks)}")
    if "report" in result:
        output.line(f"report: {result['report']}")


def _print_attribution(output: Output, attribution: dict[str, Any] | None) -> None:
    if attribution is None:
        return
    for block in attribution["blocks"]:
        left = ", ".join(f"{swap['module']} {swap['error']:.3g}" for swap in block["swapped"][:3])
        output.line(f"  {block['block']}: error {block['error']:.3g}; left with this module of the reference: {left}")
    for found in attribution["tensors"][:_SHOWN_TENSORS]:
        output.line(f"  {found['tensor']}: {found['reason']}")
    if len(attribution["tensors"]) > _SHOWN_TENSORS:
        output.line(f"  ... and {len(attribution['tensors']) - _SHOWN_TENSORS:,} more tensors (all of them: --json)")


def _fail_on(result: dict[str, Any]) -> None:
    """Raise for a verdict `different`, or a gate that did not pass.

    Raises:
        CheckFailedError: if there is either.
    """
    if result["verdict"] == "different":
        where = result["evidence"]["candidate"]["path"]
        raise CheckFailedError(
            f"{where}: does not compute what the reference computes",
            hint="Look at the tensors with: v4quant verify CANDIDATE --against REFERENCE",
        )
    failed = [gate for gate in result["gates"] if not gate["passed"]]
    if failed:
        raise CheckFailedError(
            f"{failed[0]['name']} is {failed[0]['limit']:g}, found {failed[0]['found']:.4g}",
            hint="The verdict by noise is above; this gate is your own.",
        )
