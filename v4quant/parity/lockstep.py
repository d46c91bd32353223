"""Run a candidate and its reference layer by layer over the same tokens, each weight of both read once.

    embedding -> layer 0 of the reference, layer 0 of the candidate -> ... -> heads -> MTP blocks -> MTP heads

Beside the plain runs go variants, with sums in another order and with other chunks, whose distance from the plain run
is the noise: of the reference where it runs, else of the candidate. Memory: the residual streams of six runs and what
one block makes of them, the dense weights of two blocks of each side, a few experts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from v4quant.model.block import Block
from v4quant.model.counted import CLAMPED
from v4quant.model.mtp import runnable_mtp_blocks
from v4quant.model.streaming import BlockResult, Model, RemoteBlock, Schedule
from v4quant.parity.execution import Executed, executed_by
from v4quant.parity.figures import BlockFigures, StreamFigures, compare_block, compare_streams, token_errors
from v4quant.parity.logits import LogitFigures, compare_logits, next_tokens
from v4quant.parity.prompts import Prompts
from v4quant.parity.reference import Expected, Reference
from v4quant.parity.runs import CHUNKS, ORDER, Chunking, Noise, Runs

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BlockOutcome:
    """What came of one block.

    Attributes:
        name: "layer 3" or "mtp 0".
        ratio: its compression.
        isolated, accumulated: the candidate against the reference; None where the reference's output is not known.
        noise: of each variant, isolated and accumulated.
        executed: what the candidate ran, and what it had to.
        experts_seen: experts that the candidate's router picked.
        clamped: values that swiglu_limit cut off.
        seconds, bytes_read: of both sides.
    """

    name: str
    ratio: int
    isolated: BlockFigures | None
    accumulated: BlockFigures | None
    noise: Noise
    executed: list[Executed]
    experts_seen: int
    clamped: int
    seconds: float
    bytes_read: int


@dataclass(frozen=True)
class LogitOutcome:
    """What came of a head.

    Attributes:
        found: the candidate against the reference.
        isolated: the candidate's head fed the reference's streams; None where the reference was stored.
        noise: of each variant.
    """

    found: LogitFigures
    isolated: LogitFigures | None
    noise: dict[str, LogitFigures]


@dataclass
class Outcome:
    """What came of a comparison.

    Attributes:
        tokens: T.
        noise_of: whose runs were compared with one another, "reference" or "candidate".
        embedding: streams before layer 0.
        layers: every layer.
        logits: the head.
        mtp, mtp_logits: None where no MTP block could be run, or none was stored.
        mtp_missing: the reference has an MTP block and the candidate has none.
    """

    tokens: int
    noise_of: str
    embedding: StreamFigures
    layers: list[BlockOutcome] = field(default_factory=list)
    logits: LogitOutcome | None = None
    mtp: BlockOutcome | None = None
    mtp_logits: LogitOutcome | None = None
    mtp_missing: bool = False


# Sees every block's outcome, and the reference's streams before it, [T, S, d].
Watch = Callable[[BlockOutcome, torch.Tensor], None]


class _Mark(NamedTuple):
    """A moment: seconds, and bytes of weights read."""

    seconds: float
    bytes_read: int


class Lockstep:
    """A comparison of a candidate with a reference."""

    def __init__(self, model: Model, reference: Reference, prompts: Prompts) -> None:
        """Prepare; nothing is run yet.

        Args:
            model: the candidate.

        Raises:
            UsageError: if the model cannot take the prompts.
        """
        self._model = model
        self._reference = reference
        self._prompts = prompts
        runnable = runnable_mtp_blocks(model.config) > 0
        self._has_mtp = reference.has_mtp and runnable and any(prompts.mtp_lengths)
        self._lacks_mtp = model.config.mtp_blocks < reference.mtp_blocks or (reference.has_mtp and not runnable)
        self.chunking = Chunking(
            model.schedule(prompts.ids, prompts.sizes, prompts.source),
            model.schedule(prompts.ids, prompts.other_sizes, prompts.source),
        )

    @cached_property
    def mtp_chunking(self) -> Chunking:
        """Of the tokens that an MTP block takes in."""
        _, following, _ = self._mtp_tokens
        return Chunking(Schedule.of(following), Schedule.of(following, self._prompts.other_sizes))

    @property
    def steps(self) -> int:
        """How often `run` reports progress."""
        return self._model.config.num_hidden_layers + 1 + 2 * self._has_mtp

    @torch.inference_mode()
    def run(self, watch: Watch = lambda *_: None, progress: Progress = lambda _: None) -> Outcome:
        """Run everything.

        Raises:
            CheckpointError: if weights are missing or damaged.
            CheckFailedError: if a part of the reference did not run, or computes no numbers.
        """
        runs = Runs(self._model, self.chunking, with_noise=not self._reference.has_noise)
        before = self._reference.begin(self.chunking, runs.plain.streams)
        errors = token_errors(runs.plain.streams, before)
        noise_of = "reference" if self._reference.has_noise else "candidate"
        embedding = compare_streams(runs.plain.streams, before, errors)
        outcome = Outcome(len(before), noise_of, embedding, mtp_missing=self._lacks_mtp)
        mark = self._mark()
        for layer, block in enumerate(self._model.blocks(0, self._model.config.num_hidden_layers)):
            expected = self._reference.layer(layer)
            found = self._compare(f"layer {layer}", runs, block, expected, before, mark)
            watch(found, before)
            outcome.layers.append(found)
            assert expected.result is not None, "layers are always known"
            before = expected.result.streams
            progress(f"layer {layer}")
            mark = self._mark()
        outcome.logits = self._compare_heads(runs, before, None, next_tokens(self._prompts.ids))
        progress("head")
        if self._has_mtp:
            self._run_mtp(outcome, runs, before, watch, progress)
        return outcome

    def _run_mtp(self, outcome: Outcome, runs: Runs, last: torch.Tensor, watch: Watch, progress: Progress) -> None:
        """The MTP block and its head; `last` are the reference's streams after the last layer."""
        mark = self._mark()
        rows, _, targets = self._mtp_tokens
        chunking = self.mtp_chunking
        self._reference.enter_mtp(rows, chunking, last)
        before = runs.enter_mtp(rows, chunking, last)
        expected = self._reference.mtp()
        outcome.mtp = self._compare("mtp 0", runs, self._model.mtp_block(0), expected, before, mark)
        watch(outcome.mtp, before)
        progress("MTP block")
        after = before if expected.result is None else expected.result.streams
        outcome.mtp_logits = self._compare_heads(runs, after, 0, targets)
        progress("MTP head")

    def _compare(
        self, name: str, runs: Runs, block: Block | RemoteBlock, expected: Expected, before: torch.Tensor, mark: _Mark
    ) -> BlockOutcome:
        """Take the candidate through a block and compare with what was expected; `mark` is when the block began."""
        answers = runs.take(block, before)
        counts = runs.counted.take()
        executed = executed_by(counts, self._model.config, block.ratio, runs.plain.schedule, self._model.grid)
        isolated = accumulated = None
        if expected.result is not None:
            isolated = _compare_known(answers.isolated, expected.result)
            is_one = answers.own is answers.isolated
            accumulated = isolated if is_one else _compare_known(answers.own, expected.result)
        now = self._mark()
        return BlockOutcome(
            name=name,
            ratio=block.ratio,
            isolated=isolated,
            accumulated=accumulated,
            noise=answers.noise if expected.noise is None else expected.noise,
            executed=executed,
            experts_seen=len(torch.unique(answers.own.router_indices)),
            clamped=counts[CLAMPED],
            seconds=now.seconds - mark.seconds,
            bytes_read=now.bytes_read - mark.bytes_read,
        )

    def _compare_heads(self, runs: Runs, last: torch.Tensor, mtp: int | None, targets: torch.Tensor) -> LogitOutcome:
        """Compare logits; `last` are the reference's streams before the head."""
        logits = self._reference.logits(runs, last, mtp)
        pairs = [logits.found, *logits.noise, *([logits.isolated] if logits.isolated else [])]
        found, *rest = compare_logits(logits.pieces, pairs, targets)
        noise = dict(zip((ORDER, CHUNKS), rest, strict=False))
        return LogitOutcome(found, rest[-1] if logits.isolated else None, noise)

    @cached_property
    def _mtp_tokens(self) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Rows that the MTP block predicts from, the tokens that follow them by prompt, and those after, int64 [M]."""
        rows, following, targets, first = [], [], [], 0
        for ids, size in zip(self._prompts.ids, self._prompts.mtp_lengths, strict=True):
            if size:
                rows.append(torch.arange(first, first + size))
                following.append(ids[1 : size + 1])
                targets.append(next_tokens([ids])[1 : size + 1])
            first += len(ids)
        return torch.cat(rows), following, torch.cat(targets)

    def _mark(self) -> _Mark:
        return _Mark(time.monotonic(), self._model.bytes_read + self._reference.bytes_read)


def _compare_known(found: BlockResult, expected: BlockResult) -> BlockFigures:
    """Compare with a result whose indexer's picks may be known of the first tokens alone."""
    if found.indexer_topk is not None and expected.indexer_topk is not None:
        picks = found.indexer_topk[: len(expected.indexer_topk)]
        found = BlockResult(found.streams, found.router_indices, found.router_weights, picks)
    return compare_block(found, expected)
