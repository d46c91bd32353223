"""A checkpoint of any size, one block in memory: all tokens go through a block before the next one takes its place.

    embed -> block 0 (attention chunk by chunk, experts all at once) -> block 1 -> ... -> head

Memory: the tokens' residual streams and what one block makes of them, the dense weights of this block and the next
(read while this one computes), a few experts; see docs/forward.md. Only experts that the router picked are read.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from v4quant.checkpoint.sharding.grid import Grid
from v4quant.config import V4Config
from v4quant.model.arithmetic import Arithmetic
from v4quant.model.block import Block, feed_forward_each
from v4quant.model.chunk import Chunk, check_prompts, split
from v4quant.model.expert_sources import ExpertReader, StreamedExperts
from v4quant.model.head import AnyHead, Head, embed, streams_of
from v4quant.model.mtp import MtpInput
from v4quant.model.operations import Operations, operations
from v4quant.model.ranks import ONE_RANK, Ranks
from v4quant.model.weights import Reader, Stored
from v4quant.names import block_prefix


@dataclass(frozen=True)
class Schedule:
    """All tokens of a run, and how they are cut into chunks.

    Attributes:
        input_ids: int64 [T], prompt behind prompt.
        chunks: in the order of execution.
        rows: for each chunk, which of the T tokens it holds, int64.
        sequences: number of prompts.
    """

    input_ids: torch.Tensor
    chunks: tuple[Chunk, ...]
    rows: tuple[torch.Tensor, ...]
    sequences: int

    @classmethod
    def of(cls, prompts: Sequence[torch.Tensor], sizes: Sequence[int] = ()) -> "Schedule":
        """Cut prompts into chunks.

        Args:
            prompts: int64 [n] each.
            sizes: tokens a step, as `chunk.split` takes them; none for all of each prompt at once.
        """
        chunks = tuple(split(prompts, sizes or [max(len(prompt) for prompt in prompts)]))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        starts = (lengths.cumsum(0) - lengths).to(prompts[0].device)
        rows = tuple(starts[chunk.sequences.long()] + chunk.positions for chunk in chunks)
        return cls(torch.cat(list(prompts)), chunks, rows, len(prompts))


@dataclass(frozen=True)
class BlockResult:
    """What a block made of all tokens.

    Attributes:
        streams: activations [T, S, d].
        router_indices: int64 [T, k], and router_weights: float32 [T, k].
        indexer_topk: compressed entries, int32 [T, K], -1 for none; None without an indexer.
    """

    streams: torch.Tensor
    router_indices: torch.Tensor
    router_weights: torch.Tensor
    indexer_topk: torch.Tensor | None


@dataclass(frozen=True)
class Pass:
    """One of several runs that go through the same block side by side.

    Attributes:
        ops: the run's own operations.
        streams: activations [T, S, d].
        schedule: of its tokens.
    """

    ops: Operations
    streams: torch.Tensor
    schedule: Schedule


class RemoteBlock(Protocol):
    """A block that ranks hold between them."""

    @property
    def ratio(self) -> int:
        """Its compression: 0, 4 or 128."""

    def take(self, passes: Sequence[Pass]) -> list[BlockResult]:
        """As `take`."""


@dataclass(frozen=True)
class Lane:
    """One of several runs that go through a block side by side.

    Attributes:
        block: with the run's own operations, and weights where it has its own.
        streams: activations [T, S, d].
        schedule: of its tokens.
    """

    block: Block
    streams: torch.Tensor
    schedule: Schedule


def run_block(block: Block, streams: torch.Tensor, schedule: Schedule) -> BlockResult:
    """Take all tokens through a block, with a cache of its own.

    Args:
        streams: activations [T, S, d].
    """
    return run_lanes([Lane(block, streams, schedule)])[0]


def take(block: Block | RemoteBlock, passes: Sequence[Pass]) -> list[BlockResult]:
    """Take all tokens of several runs through a block; each expert is read once."""
    if not isinstance(block, Block):
        return block.take(passes)
    return run_lanes([Lane(block.with_operations(own.ops), own.streams, own.schedule) for own in passes])


def run_lanes(lanes: Sequence[Lane]) -> list[BlockResult]:
    """Take all tokens of several runs through blocks that share one source of experts; each expert is read once.

    The bits of each are those of run_block alone.
    """
    attended = [_attend(lane) for lane in lanes]
    inputs = zip(lanes, attended, strict=True)
    routed = feed_forward_each([(lane.block, streams, lane.schedule.input_ids) for lane, (streams, _) in inputs])
    return [
        BlockResult(found.streams, found.indices, found.weights, picks)
        for found, (_, picks) in zip(routed, attended, strict=True)
    ]


def _attend(lane: Lane) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Streams after attention, and the indexer's picks, int32 [T, K], -1 for none."""
    block, streams, schedule = lane.block, lane.streams, lane.schedule
    cache = block.cache(schedule.sequences)
    attended = torch.empty_like(streams)
    picks: list[torch.Tensor] = []
    for chunk, rows in zip(schedule.chunks, schedule.rows, strict=True):
        attended[rows], picked = block.attend(streams[rows], chunk, cache)
        if picked is not None:
            picks.append(picked)
    if not picks:
        return attended, None
    widest = max(picked.shape[1] for picked in picks)
    topk = torch.full((len(streams), widest), -1, dtype=torch.int32, device=streams.device)
    for rows, picked in zip(schedule.rows, picks, strict=True):
        topk[rows, : picked.shape[1]] = picked
    return attended, topk


class Model(Protocol):
    """A model that is run block by block, in this process alone or by ranks.

    Attributes:
        config: to run by.
        source_id: what tells its weights from others.
        ops: the operations of a plain run.
        arithmetic, device: of the run.
        grid: how ranks share it.
    """

    config: V4Config
    source_id: str
    ops: Operations
    arithmetic: Arithmetic
    device: torch.device
    grid: Grid

    @property
    def bytes_read(self) -> int:
        """Stored bytes of weights read so far, by all ranks."""

    def schedule(self, prompts: Sequence[torch.Tensor], sizes: Sequence[int] = (), where: str = "tokens") -> Schedule:
        """Check prompts and cut them into chunks; see StreamedModel.schedule."""

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What goes into the first layer: activations [T, S, d]."""

    def blocks(self, first: int, stop: int) -> Iterator[Block | RemoteBlock]:
        """Layers first to stop - 1, in order."""

    def mtp_block(self, index: int) -> Block | RemoteBlock:
        """An MTP block."""

    def mtp_inputs(
        self, index: int, runs: Sequence[tuple[torch.Tensor, Operations]], next_ids: torch.Tensor
    ) -> list[torch.Tensor]:
        """What goes into an MTP block; see StreamedModel.mtp_inputs."""

    def head(self, mtp: int | None = None) -> AnyHead:
        """The model's head, or that of an MTP block."""


def checked_schedule(
    prompts: Sequence[torch.Tensor], sizes: Sequence[int], where: str, config: V4Config, device: torch.device
) -> Schedule:
    """Check prompts and cut them into chunks; see StreamedModel.schedule."""
    check_prompts(prompts, config, where)
    return Schedule.of([prompt.to(device) for prompt in prompts], sizes)


class StreamedModel:
    """A checkpoint, or a rank's share of one, run block by block; a context manager, as threads read ahead."""

    def __init__(
        self,
        source: Stored,
        arithmetic: Arithmetic | None = None,
        device: torch.device | str = "cpu",
        *,
        config: V4Config | None = None,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """Prepare to run; no weights are read yet.

        Args:
            source: a checkpoint, or what a rank holds.
            config: to run by, if not the checkpoint's own; of the same shapes.
            ranks: this rank, and those that compute each block with it; all run the same.

        Raises:
            CheckpointError: if the checkpoint has problems.
        """
        self.config = config or source.config
        self.source_id = source.source_id()
        self.reader = Reader(source, arithmetic or Arithmetic(), device, ranks)
        self.arithmetic, self.device = self.reader.arithmetic, self.reader.device
        self.ops = operations(self.config, self.arithmetic)
        self.grid = ranks.place.grid
        self._experts = ExpertReader(self.reader)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blocks")

    def __enter__(self) -> "StreamedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self._experts.close()
        self._thread.shutdown(cancel_futures=True)

    @property
    def bytes_read(self) -> int:
        """Stored bytes of weights read so far."""
        return self.reader.weights.bytes_read

    def schedule(self, prompts: Sequence[torch.Tensor], sizes: Sequence[int] = (), where: str = "tokens") -> Schedule:
        """Check prompts and cut them into chunks.

        Raises:
            UsageError: for prompts that the model cannot take; `where` says where they came from.
            ValueError: for a size that is not positive.
        """
        return checked_schedule(prompts, sizes, where, self.config, self.device)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What goes into the first layer: activations [T, S, d]."""
        return streams_of(embed(input_ids, self.reader, self.ops), self.config.hc_mult)

    def blocks(self, first: int, stop: int) -> Iterator[Block]:
        """Layers first to stop - 1, each with the next one being read."""
        coming = self._thread.submit(self._block, "layers", first) if first < stop else None
        for index in range(first, stop):
            assert coming is not None
            block = coming.result()
            coming = self._thread.submit(self._block, "layers", index + 1) if index + 1 < stop else None
            yield block
            del block  # before the next one arrives

    def mtp_block(self, index: int) -> Block:
        """An MTP block."""
        return self._block("mtp", index)

    def mtp_inputs(
        self, index: int, runs: Sequence[tuple[torch.Tensor, Operations]], next_ids: torch.Tensor
    ) -> list[torch.Tensor]:
        """What goes into an MTP block; see MtpInput.

        Args:
            runs: streams after the last layer, activations [T, S, d], and the operations of each run.
            next_ids: int64 [T], the token that follows each.

        Returns:
            activations [T, S, d] of each run.
        """
        entry = MtpInput.read(self.reader, index)
        return [entry.streams(streams, next_ids, self.reader, ops) for streams, ops in runs]

    def head(self, mtp: int | None = None) -> Head:
        """The model's head, or that of an MTP block."""
        return Head(self.reader, self.ops, "" if mtp is None else block_prefix("mtp", mtp))

    def _block(self, kind: str, index: int) -> Block:
        weights = self.reader.block(kind, index)
        source = StreamedExperts(self._experts, kind, index)
        return Block(weights, self.reader.ratio(kind, index), source, self.config, self.ops, self.reader.ranks)
