"""The runs that go through one checkpoint side by side: the plain one, and those that show how much of it is noise.

Every run has its own residual streams, which accumulate from block to block, and for each block also an isolated
answer: what it makes of the reference's streams. Runs that would do the same thing twice do it once.
"""

from dataclasses import dataclass

import torch

from v4quant.model.block import Block
from v4quant.model.counted import Counted
from v4quant.model.operations import Operations
from v4quant.model.reordered import Reordered
from v4quant.model.streaming import BlockResult, Model, Pass, RemoteBlock, Schedule, take
from v4quant.parity.figures import BlockFigures, compare_block
from v4quant.parity.logits import Collapsed

ORDER, CHUNKS = "other summation order", "other chunking"
Noise = dict[str, tuple[BlockFigures, BlockFigures]]


@dataclass(frozen=True)
class Chunking:
    """The same tokens cut in two ways, for the plain run and for the one with other chunks."""

    plain: Schedule
    other: Schedule


@dataclass(eq=False)
class Run:
    """One run: how it computes, how its tokens are cut, and where it has come to.

    Attributes:
        ops: its operations.
        schedule: its chunks.
        streams: activations [T, S, d] after the last block that is done.
    """

    ops: Operations
    schedule: Schedule
    streams: torch.Tensor


@dataclass(frozen=True)
class Answers:
    """What the runs of one checkpoint made of a block.

    Attributes:
        own: the plain run, fed its own streams.
        isolated: the plain run, fed the reference's.
        noise: of each variant, how far it is from the plain run: isolated, and accumulated.
    """

    own: BlockResult
    isolated: BlockResult
    noise: Noise


class Runs:
    """The runs through one checkpoint.

    Attributes:
        counted: the operations of the plain run.
        plain: the run that is compared.
        variants: the same tokens in another order of sums, and in other chunks; none where no noise is measured.
    """

    def __init__(self, model: Model, chunking: Chunking, *, with_noise: bool) -> None:
        """Begin with the embedding of the tokens."""
        streams = model.embed(chunking.plain.input_ids)
        self._model = model
        self.counted = Counted(model.config)
        self.plain = Run(self.counted, chunking.plain, streams)
        self.variants: dict[str, Run] = {}
        if with_noise:
            self.variants[ORDER] = Run(Reordered(model.config), chunking.plain, streams)
            self.variants[CHUNKS] = Run(model.ops, chunking.other, streams)

    @property
    def _every(self) -> list[Run]:
        return [self.plain, *self.variants.values()]

    def take(self, block: Block | RemoteBlock, isolated_input: torch.Tensor) -> Answers:
        """Take every run through a block.

        Args:
            isolated_input: the reference's streams before this block, [T, S, d].
        """
        every = self._every
        passes = [Pass(run.ops, run.streams, run.schedule) for run in every]
        # Where a run stands where the reference stands, its own answer is the isolated one.
        apart = [run for run in every if not torch.equal(run.streams, isolated_input)]
        ops = [self._model.ops if run is self.plain else run.ops for run in apart]  # what is counted is counted once
        passes += [Pass(own, isolated_input, run.schedule) for own, run in zip(ops, apart, strict=True)]
        results = take(block, passes)
        own, others = results[: len(every)], iter(results[len(every) :])
        isolated = [next(others) if run in apart else result for run, result in zip(every, own, strict=True)]
        noise: Noise = {}
        for place, variant in enumerate(self.variants, start=1):
            figures = compare_block(isolated[place], isolated[0])
            # A run that is fed what the plain one is fed has no noise but that of the block.
            is_one = own[place] is isolated[place] and own[0] is isolated[0]
            noise[variant] = figures, figures if is_one else compare_block(own[place], own[0])
        for run, result in zip(every, own, strict=True):
            run.streams = result.streams
        return Answers(own[0], isolated[0], noise)

    def enter_mtp(self, rows: torch.Tensor, chunking: Chunking, last: torch.Tensor) -> torch.Tensor:
        """Go on with what an MTP block takes in.

        Args:
            rows: int64 [M], the tokens that it predicts from.
            chunking: of the tokens that follow them.
            last: the reference's streams after the last layer, [T, S, d].

        Returns:
            what this checkpoint makes of `last` for its MTP block: activations [M, S, d].
        """
        runs = [(last[rows], self.plain.ops), *((run.streams[rows], run.ops) for run in self._every)]
        before, *own = self._model.mtp_inputs(0, runs, chunking.plain.input_ids)
        for (name, run), streams in zip([("", self.plain), *self.variants.items()], own, strict=True):
            run.streams = streams
            run.schedule = chunking.other if name == CHUNKS else chunking.plain
        self.counted.take()  # what stands before the block is no part of it
        return before

    def collapsed(self, mtp: int | None, *more: torch.Tensor) -> list[Collapsed]:
        """Every run's streams before the vocabulary matrix, then `more` streams in the arithmetic of the plain run."""
        head = self._model.head(mtp)
        runs = [Collapsed.of(head, run.streams, run.ops) for run in self._every]
        return runs + [Collapsed.of(head, streams, self.plain.ops) for streams in more]
