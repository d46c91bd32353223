"""`v4quant reference`: run the model, layer by layer, and write what it computes."""

import re
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from v4quant.cli._memory import peak_memory_bytes
from v4quant.cli._options import AnySource, JsonMode, Overwrite
from v4quant.cli._output import Output, decimal_bytes, plural
from v4quant.cli._progress import layer_progress
from v4quant.cli._ranks import device_of, processes_of
from v4quant.cli._source import lies_in, open_source
from v4quant.errors import OutputError, UsageError

if TYPE_CHECKING:
    from v4quant.checkpoint.reader import Checkpoint
    from v4quant.checkpoint.sharding.rank_tensors import Sharded
    from v4quant.model.arithmetic import Arithmetic
    from v4quant.model.device import Device
    from v4quant.model.process_ranks import ProcessRanks
    from v4quant.model.streaming import Model


def reference(
    src: AnySource,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, *.safetensors.", show_default=False)],
    tokens: Annotated[
        Path, typer.Option(metavar="FILE", help="safetensors with input_ids I64 [T].", show_default=False)
    ],
    prefill: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of the prefill; the others are decode steps. [all]", min=1)
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="A-B", help="Run these layers; from A > 0 on, FILE holds layer{A-1}.out.")
    ] = None,
    arithmetic: Annotated[
        str, typer.Option(help="release: activations rounded as in the release. stored: as each format would be run.")
    ] = "release",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overwrite: Overwrite = False,
    json_mode: JsonMode = False,
) -> None:
    """Run a checkpoint of any size, one layer in memory, and write logits and every layer's output.

    \b
    v4quant reference DeepSeek-V4-Flash flash.safetensors --tokens prompt.safetensors
    v4quant reference DeepSeek-V4-Flash flash.safetensors --tokens prompt.safetensors --prefill 1000
    v4quant reference DeepSeek-V4-Pro first.safetensors --tokens prompt.safetensors --layers 0-9
    torchrun --nproc-per-node 4 -m v4quant reference flash-tp4 flash.safetensors --tokens prompt.safetensors
    """
    # torch loads here, so that `v4quant --help` need not wait for it.
    from v4quant.checkpoint.process_group import ProcessGroup
    from v4quant.checkpoint.sharding.rank_tensors import Sharded, as_stored
    from v4quant.model.ranked import serve_rank

    with ProcessGroup.from_environment() as group, group.ending_together():
        place = device_of(device, group)
        checkpoint = as_stored(open_source(src))
        with processes_of(checkpoint, group, place) as processes:
            if processes is not None and not group.is_first:
                assert isinstance(checkpoint, Sharded)
                serve_rank(checkpoint, place, processes)
            else:
                run = _Run(checkpoint, _arithmetic(arithmetic, device), place, processes)
                _write(run, src, out, tokens, prefill, layers, overwrite, Output(json_mode))


@dataclass(frozen=True)
class _Run:
    """What is run, how, where and by whom."""

    source: "Checkpoint | Sharded"
    arithmetic: "Arithmetic"
    device: "Device"
    processes: "ProcessRanks | None"

    def model(self) -> "AbstractContextManager[Model]":
        """The model, ready to run."""
        from v4quant.model.ranked import model_of

        return model_of(self.source, self.arithmetic, self.device, processes=self.processes)


def _write(
    run: _Run,
    src: str,
    out: Path,
    tokens: Path,
    prefill: int | None,
    layers: str | None,
    overwrite: bool,
    output: Output,
) -> None:
    """Run and write, and say what came of it."""
    from v4quant.model.reference import Task, output_tensors, write_reference

    start = time.monotonic()
    checkpoint = run.source
    config = checkpoint.config
    task = Task.load(tokens, config, prefill, _parse_layers(layers))
    _require_free_file(out, src, tokens, overwrite)
    if config.is_dspark:
        output.note(f"{plural(config.mtp_blocks, 'DSpark stage')} of {checkpoint.release}: not run")
    with run.model() as model:
        steps = (
            task.last - task.first + 1 + sum(name in output_tensors(task, config) for name in ("logits", "mtp_logits"))
        )
        with layer_progress(steps, "reference") as done:
            write_reference(model, task, out, done)
        read = model.bytes_read
    seconds = time.monotonic() - start
    peak = peak_memory_bytes()
    output.line(f"{checkpoint.release}, {checkpoint.scheme.name}: layers {task.first} to {task.last}")
    output.line(
        f"{plural(len(task.input_ids), 'token')}, {task.prefill:,} in the prefill and "
        f"{plural(len(task.input_ids) - task.prefill, 'decode step')}"
    )
    output.line(
        f"{seconds:.1f} s, read {decimal_bytes(read)} (checkpoint: {decimal_bytes(checkpoint.bytes)}), peak memory "
        f"{decimal_bytes(peak)}"
    )
    output.line(f"wrote {out}")
    output.result(
        {
            "tokens": len(task.input_ids),
            "prefill": task.prefill,
            "layers": [task.first, task.last],
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak,
            "bytes_read": read,
            "output": str(out),
        }
    )


def _parse_layers(text: str | None) -> tuple[int, int] | None:
    """ "3" or "0-9", inclusive."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    if match is None:
        raise UsageError(f"--layers is {text!r}, expected a layer or a range", hint="For example: --layers 0-9")
    return int(match[1]), int(match[2] or match[1])


def _arithmetic(activations: str, device: str) -> "Arithmetic":
    from v4quant.model.arithmetic import Activations, Arithmetic, Products

    if activations not in (Activations.RELEASE, Activations.STORED):
        raise UsageError(f"--arithmetic is {activations!r}, expected release or stored")
    return Arithmetic(Activations(activations), Products.DECODED if device == "cpu" else Products.CODED)


def _require_free_file(out: Path, src: str, tokens: Path, overwrite: bool) -> None:
    if out.suffix != ".safetensors":
        raise UsageError(
            f"{out}: expected a file name that ends in .safetensors", hint=f"For example: {out}.safetensors"
        )
    if lies_in(out, src):
        raise UsageError(f"{out}: lies in the checkpoint that is read", hint="Choose a file outside of it.")
    if out.is_dir():
        raise OutputError(f"{out}: is a folder, expected a file to write")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent}: no such folder", hint=f"Make it first: mkdir -p {out.parent}")
    if out.exists() and out.samefile(tokens):
        raise UsageError(f"{out}: is the file of tokens itself", hint="Choose another output file.")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already", hint="Choose another file, or replace it with: --overwrite")
