"""From two checkpoints, or one and stored outputs, to everything that a report says: run, judge, attribute."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch

from v4quant.checkpoint.reader import Checkpoint
from v4quant.checkpoint.sharding.compare_shares import share_differences
from v4quant.checkpoint.sharding.rank_tensors import Sharded
from v4quant.checkpoint.verify import value_differences
from v4quant.checkpoint.verify_report import Mismatch
from v4quant.config import V4Config
from v4quant.errors import UsageError
from v4quant.model.arithmetic import Activations, Arithmetic, Products
from v4quant.model.process_ranks import ProcessRanks
from v4quant.model.ranked import model_of
from v4quant.model.streaming import Schedule, StreamedModel
from v4quant.parity.attribution import BlockAttribution, Suspects, attribute
from v4quant.parity.coverage import Coverage, coverage_of
from v4quant.parity.lockstep import Lockstep, Outcome, Progress
from v4quant.parity.prompts import Prompts
from v4quant.parity.reference import Alongside, Stored
from v4quant.parity.stored import StoredOutputs
from v4quant.parity.verdict import Judgement, Verdict, judge

# What two models must have in common to be compared layer by layer.
_SHAPE = (
    *("vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_hash_layers"),
    *("num_attention_heads", "n_routed_experts", "num_experts_per_tok", "q_lora_rank", "o_lora_rank", "o_groups"),
    *("head_dim", "qk_rope_head_dim", "index_n_heads", "index_head_dim", "hc_mult"),
)


@dataclass(frozen=True)
class Task:
    """What to compare, and how.

    Attributes:
        candidate: the checkpoint in question; a sharded one is run by its ranks.
        reference: what it is compared with.
        prompts: tokens.
        activations: release or stored.
        device: where to compute.
        index_topk: for both sides, in the place of config.json's; None to leave it.
        processes: a sharded candidate's ranks, of which this process is the first; None for threads of this process.
    """

    candidate: Checkpoint | Sharded
    reference: Checkpoint | StoredOutputs
    prompts: Prompts
    activations: Activations = Activations.RELEASE
    device: torch.device | str = "cpu"
    index_topk: int | None = None
    processes: ProcessRanks | None = None

    @property
    def arithmetic(self) -> Arithmetic:
        """The same for both sides: decoded products, which are one arithmetic for every stored form."""
        return Arithmetic(self.activations, Products.DECODED)

    def config_of(self, checkpoint: Checkpoint | Sharded) -> V4Config:
        """A side's config as it is run."""
        return checkpoint.config if self.index_topk is None else replace(checkpoint.config, index_topk=self.index_topk)


@dataclass(frozen=True)
class Comparison:
    """Everything that came of it.

    Attributes:
        outcome: figures.
        judgement: the verdict, and why.
        attribution: of the blocks that depart first and most; () for other verdicts and stored references.
        coverage: what was exercised.
        schedule: chunks of the plain run.
        seconds: of the whole comparison.
        bytes_read: of weights, both sides.
    """

    outcome: Outcome
    judgement: Judgement
    attribution: tuple[BlockAttribution, ...]
    coverage: Coverage
    schedule: Schedule
    seconds: float
    bytes_read: int


def compare(task: Task, progress: Callable[[int], Progress] = lambda _: lambda _: None) -> Comparison:
    """Compare a candidate with a reference.

    Args:
        progress: given the number of steps, gives what is told of each.

    Raises:
        UsageError: if the models have other shapes, or cannot take the prompts.
        CheckpointError: if weights are missing or damaged.
        CheckFailedError: if a part of the reference did not run.
    """
    start = time.monotonic()
    if isinstance(task.reference, Checkpoint):
        require_same_shape(task.candidate, task.reference)
    with ExitStack() as stack:
        config, processes = task.config_of(task.candidate), task.processes
        model = model_of(task.candidate, task.arithmetic, task.device, config=config, processes=processes)
        candidate = stack.enter_context(model)
        alongside = None
        if isinstance(task.reference, Checkpoint):
            alongside = stack.enter_context(_model(task, task.reference))
            reference: Alongside | Stored = Alongside(alongside)
        else:
            reference = Stored(task.reference)
        lockstep = Lockstep(candidate, reference, task.prompts)
        suspects = Suspects(len(lockstep.chunking.plain.input_ids))
        outcome = lockstep.run(suspects.watch, progress(lockstep.steps))
        judgement = judge(outcome)
        attribution = []
        if alongside is not None and judgement.verdict is Verdict.DIFFERENT:
            whole = stack.enter_context(_model(task, task.candidate))
            for name, streams in suspects.chosen(judgement.departing_blocks(outcome)).items():
                schedule = lockstep.mtp_chunking.plain if name.startswith("mtp") else lockstep.chunking.plain
                attribution.append(attribute(name, streams, schedule, whole, alongside, partial(_differences, task)))
        read = candidate.bytes_read + reference.bytes_read
    # What the reference has is what there is to cover: a candidate may have lost some of it.
    covered = task.reference if isinstance(task.reference, Checkpoint) else task.candidate
    coverage = coverage_of(outcome, task.config_of(covered), task.prompts)
    schedule = lockstep.chunking.plain
    return Comparison(outcome, judgement, tuple(attribution), coverage, schedule, time.monotonic() - start, read)


def _model(task: Task, checkpoint: Checkpoint | Sharded) -> StreamedModel:
    return StreamedModel(checkpoint, task.arithmetic, task.device, config=task.config_of(checkpoint))


def _differences(task: Task, prefix: str) -> list[Mismatch]:
    """Tensors of a block whose values differ."""
    assert isinstance(task.reference, Checkpoint)
    if isinstance(task.candidate, Sharded):
        return list(share_differences(task.candidate, task.reference, prefix))
    return value_differences(task.candidate, task.reference, prefix)


def require_same_shape(candidate: Checkpoint | Sharded, reference: Checkpoint) -> None:
    """Refuse two models that have no layers to compare.

    Raises:
        UsageError: naming the key that differs.
    """
    ours, theirs = candidate.config, reference.config
    for key in _SHAPE:
        if getattr(ours, key) != getattr(theirs, key):
            raise UsageError(
                f"{candidate.where}: {key} is {getattr(ours, key)}, expected {getattr(theirs, key)} as in "
                f"{reference.where}: the two are models of different shapes",
                hint="Compare a checkpoint with the one it was made from.",
            )
    layers = ours.num_hidden_layers
    for layer, pair in enumerate(zip(ours.compress_ratios[:layers], theirs.compress_ratios[:layers], strict=True)):
        if pair[0] != pair[1]:
            raise UsageError(
                f"{candidate.where}: compress_ratios is {pair[0]} in layer {layer}, expected {pair[1]} as in "
                f"{reference.where}: the two are models of different shapes",
                hint="Compare a checkpoint with the one it was made from.",
            )
