"""Write what a checkpoint computes: logits, every layer's output, routing and indexer picks, MTP logits.

Names and shapes, T tokens of which P in one prefill and the others one decode step each; S streams of d, V vocabulary:

    input_ids I64 [T] · logits F32 [T, V] · mtp_logits F32 [P - 1, V] · layer{i}.out BF16 [T, S, d]
    layer{i}.router_indices I32 [T, k] · layer{i}.router_weights F32 [T, k]
    layer{i}.indexer_topk I32 [P, K], CSA layers: entry j of the prefill stands as j + P, -1 is none

Layers are written as they are done; the file has its name only when it is whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from v4quant.checkpoint.tensor_file import TensorFile, TensorWriter
from v4quant.config import V4Config
from v4quant.errors import CheckpointError, UsageError
from v4quant.model.head import logits
from v4quant.model.mtp import runnable_mtp_blocks
from v4quant.model.streaming import BlockResult, Model, Pass, Schedule, take

# Tokens whose logits are in memory at a time: 265 MB with the released vocabulary of 129,280.
_LOGIT_ROWS = 512
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """What to run.

    Attributes:
        input_ids: int64 [T].
        prefill: P, 1 to T.
        first, last: layers to run, inclusive.
        streams: bfloat16 [T, S, d], what goes into layer `first`; None for the embedding, before layer 0.
    """

    input_ids: torch.Tensor
    prefill: int
    first: int
    last: int
    streams: torch.Tensor | None

    @classmethod
    def load(cls, path: Path, config: V4Config, prefill: int | None, layers: tuple[int, int] | None) -> "Task":
        """Read tokens, and where the first layer is not layer 0 the output of the one before, from a file.

        Args:
            path: safetensors with `input_ids` I64 or I32 [T] and, from layer A on, `layer{A-1}.out` BF16 [T, S, d].
            config: of the model.
            prefill: P; None for T.
            layers: first and last; None for all.

        Raises:
            UsageError: if the prefill or the layers do not fit.
            CheckpointError: if the file is damaged, or a tensor is missing or of another dtype or shape.
        """
        file = TensorFile(path)
        ids = file.read("input_ids", (torch.int64, torch.int32)).long()
        if ids.dim() != 1:
            raise UsageError(f"{path}: input_ids has shape {list(ids.shape)}, expected one row of token ids")
        first, last = layers or (0, config.num_hidden_layers - 1)
        if not 0 <= first <= last < config.num_hidden_layers:
            raise UsageError(f"layers are {first}-{last}, expected a part of 0-{config.num_hidden_layers - 1}")
        prefill = len(ids) if prefill is None else prefill
        if not 1 <= prefill <= len(ids):
            raise UsageError(f"prefill is {prefill}, expected 1 to the {len(ids)} tokens of {path}")
        streams = None
        if first:
            name, shape = f"layer{first - 1}.out", (len(ids), config.hc_mult, config.hidden_size)
            streams = file.read(name, (torch.bfloat16,))
            if streams.shape != shape:
                raise UsageError(f"{path}: {name} has shape {list(streams.shape)}, expected {list(shape)}")
            if not bool(streams.isfinite().all()):
                raise CheckpointError(f"{path}: {name} holds NaN or infinity", hint="Compute it again.")
        return cls(ids, prefill, first, last, streams)


def output_tensors(task: Task, config: V4Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Header dtype and shape of everything that a task writes."""
    tokens, picks = len(task.input_ids), config.num_experts_per_tok
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"input_ids": ("I64", (tokens,))}
    for layer in range(task.first, task.last + 1):
        tensors[f"layer{layer}.out"] = ("BF16", (tokens, config.hc_mult, config.hidden_size))
        tensors[f"layer{layer}.router_indices"] = ("I32", (tokens, picks))
        tensors[f"layer{layer}.router_weights"] = ("F32", (tokens, picks))
        if config.compress_ratios[layer] == 4:
            tensors[f"layer{layer}.indexer_topk"] = ("I32", (task.prefill, _picks(task.prefill, config)))
    if task.last == config.num_hidden_layers - 1:
        tensors["logits"] = ("F32", (tokens, config.vocab_size))
        if runnable_mtp_blocks(config) and task.prefill > 1:
            tensors["mtp_logits"] = ("F32", (task.prefill - 1, config.vocab_size))
    return tensors


@torch.inference_mode()
def write_reference(model: Model, task: Task, out: Path, progress: Progress = lambda _: None) -> None:
    """Run a task, layer by layer, and write its outputs.

    Args:
        model: the checkpoint.
        task: what to run.
        out: the file.
        progress: called with the name of each layer, head or MTP block that is done.

    Raises:
        UsageError: for tokens that the model cannot take.
        CheckpointError: if weights are missing or damaged.
        OutputError: if the disk refuses.
    """
    schedule = model.schedule([task.input_ids], [task.prefill, 1], "input_ids")
    tensors = output_tensors(task, model.config)
    metadata = {"tokens": str(len(task.input_ids)), "prefill": str(task.prefill)}
    metadata |= {"activations": model.arithmetic.activations, "source_id": model.source_id}
    writer = TensorWriter(out, tensors, metadata)
    try:
        writer.write("input_ids", task.input_ids)
        streams = model.embed(schedule.input_ids) if task.streams is None else task.streams.to(model.device)
        for layer, block in enumerate(model.blocks(task.first, task.last + 1), start=task.first):
            (result,) = take(block, [Pass(model.ops, streams, schedule)])
            _write_layer(writer, f"layer{layer}", result, task.prefill, _picks(task.prefill, model.config))
            streams = result.streams
            progress(f"layer {layer}")
        if "logits" in tensors:
            _write_logits(writer, "logits", model, streams, None)
            progress("head")
        if "mtp_logits" in tensors:
            _write_logits(writer, "mtp_logits", model, mtp_streams(model, streams, schedule.input_ids, task.prefill), 0)
            progress("MTP")
        writer.finish()
    except BaseException:  # an interrupt too: half a file is no reference
        writer.abandon()
        raise


def mtp_streams(model: Model, streams: torch.Tensor, input_ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Streams after the MTP block, for the first P - 1 tokens in one piece, each with the token that follows it.

    Args:
        streams: activations [T, S, d] after the last layer.
        input_ids: int64 [T].
        prefill: P, 2 or more.
    """
    following = input_ids[1:prefill]
    (inner,) = model.mtp_inputs(0, [(streams[: prefill - 1], model.ops)], following)
    (result,) = take(model.mtp_block(0), [Pass(model.ops, inner, Schedule.of([following]))])
    return result.streams


def _picks(prefill: int, config: V4Config) -> int:
    """Entries that the indexer picks for a token of the prefill."""
    return min(config.index_topk, prefill // 4)


def _write_layer(writer: TensorWriter, name: str, result: BlockResult, prefill: int, width: int) -> None:
    writer.write(f"{name}.out", result.streams)
    writer.write(f"{name}.router_indices", result.router_indices.to(torch.int32))
    writer.write(f"{name}.router_weights", result.router_weights)
    if result.indexer_topk is not None:
        picks = result.indexer_topk[:prefill, :width]  # decode steps may see more entries
        writer.write(f"{name}.indexer_topk", torch.where(picks >= 0, picks + prefill, -1))


def _write_logits(writer: TensorWriter, name: str, model: Model, streams: torch.Tensor, mtp: int | None) -> None:
    head = model.head(mtp)
    for first in range(0, len(streams), _LOGIT_ROWS):
        writer.write(name, logits(head, streams[first : first + _LOGIT_ROWS]), first)
