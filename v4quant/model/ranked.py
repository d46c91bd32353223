"""A sharded checkpoint, run by its ranks: to whoever runs it, a model like any other.

    this side                  every rank (rank_worker.py)
    order, with streams   ->   does its part, and exchanges what must be added up with those of its stage
    answers               <-   streams, from the stage's first rank; logits, from each its part of the vocabulary

What ranks compute alike begins with the same bits in each block, because its input comes from here. Ranks are threads
of this process (virtual_ranks.py) or processes that torchrun has started (process_ranks.py).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch

from v4quant.checkpoint.reader import Checkpoint
from v4quant.checkpoint.sharding.rank_copies import CopyCheck
from v4quant.checkpoint.sharding.rank_tensors import Sharded
from v4quant.config import V4Config
from v4quant.model.arithmetic import Arithmetic
from v4quant.model.counted import Counted
from v4quant.model.head import Piece, vocabulary_pieces
from v4quant.model.operations import Operations, operations
from v4quant.model.process_ranks import ProcessRanks
from v4quant.model.rank_worker import Answer, How, Order, RankPass, RankWorker, Taken, on_device
from v4quant.model.ranks import Ranks
from v4quant.model.streaming import BlockResult, Model, Pass, Schedule, StreamedModel, checked_schedule
from v4quant.model.virtual_ranks import VirtualRanks


class Crew(Protocol):
    """All ranks of a run."""

    def call(self, order: Any) -> list[Any]:
        """Ask every rank the same; their answers, in rank order."""

    def close(self, *, in_order: bool) -> None:
        """Let them go; in order, if the run came to its end."""


class RankedModel:
    """A sharded checkpoint; a context manager, as its ranks are let go at the end.

    Attributes:
        config: to run by.
        source_id: what tells its weights from others.
        ops: the operations of a plain run.
        arithmetic, device: of the run.
        grid: how ranks share the model.
        crew: the ranks.
    """

    def __init__(
        self, sharded: Sharded, arithmetic: Arithmetic, device: torch.device | str, config: V4Config, crew: Crew
    ) -> None:
        self.config = config
        self.source_id = sharded.source_id()
        self.arithmetic, self.device = arithmetic, torch.device(device)
        self.ops = operations(config, arithmetic)
        self.grid = sharded.grid
        self.crew = crew
        self._bytes_read = 0
        self._copies = CopyCheck(sharded.where)

    def __enter__(self) -> "RankedModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.crew.close(in_order=error is None)

    @property
    def bytes_read(self) -> int:
        """Stored bytes of weights read so far, by all ranks."""
        return self._bytes_read

    def schedule(self, prompts: Sequence[torch.Tensor], sizes: Sequence[int] = (), where: str = "tokens") -> Schedule:
        """As StreamedModel.schedule."""
        return checked_schedule(prompts, sizes, where, self.config, self.device)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What goes into the first layer: activations [T, S, d]."""
        streams: torch.Tensor = self.tell("embed", input_ids)
        return streams

    def blocks(self, first: int, stop: int) -> Iterator["_Block"]:
        """Layers first to stop - 1, each with the next one being read."""
        self.ask("begin", first, stop)
        for index in range(first, stop):
            yield _Block(self, "layers", index, self.config.compress_ratios[index])

    def mtp_block(self, index: int) -> "_Block":
        """An MTP block."""
        return _Block(self, "mtp", index, self.config.compress_ratios[self.config.num_hidden_layers + index])

    def mtp_inputs(
        self, index: int, runs: Sequence[tuple[torch.Tensor, Operations]], next_ids: torch.Tensor
    ) -> list[torch.Tensor]:
        """As StreamedModel.mtp_inputs."""
        named = [(streams, How.of(ops)) for streams, ops in runs]
        found: list[torch.Tensor] = self.tell("mtp_inputs", index, named, next_ids)
        return found

    def head(self, mtp: int | None = None) -> "_Head":
        """The model's head, or that of an MTP block."""
        return _Head(self, mtp)

    def ask(self, what: str, *arguments: Any) -> list[Any]:
        """Ask every rank; what each says, in rank order, None where it says nothing.

        Raises:
            CheckpointError: if ranks hold different copies of a tensor.
        """
        answers: list[Answer] = self.crew.call(Order(what, on_device(arguments, torch.device("cpu"))))
        for answer in answers:
            self._copies.take(answer.copies)
        self._bytes_read = sum(answer.bytes_read for answer in answers)
        return [on_device(answer.value, self.device) for answer in answers]

    def tell(self, what: str, *arguments: Any) -> Any:
        """Ask every rank for what one of them tells."""
        return next(value for value in self.ask(what, *arguments) if value is not None)


@dataclass(frozen=True)
class _Block:
    """A block that the ranks of a stage hold between them."""

    model: RankedModel
    kind: str
    index: int
    ratio: int

    def take(self, passes: Sequence[Pass]) -> list[BlockResult]:
        """As streaming.take; what all ranks executed is added to the operations that count."""
        asked = [RankPass(How.of(own.ops), own.streams, own.schedule) for own in passes]
        answers: list[Taken] = [own for own in self.model.ask("take", self.kind, self.index, asked) if own is not None]
        for place, own in enumerate(passes):
            if isinstance(own.ops, Counted):
                own.ops.add(sum((answer.counts[place] for answer in answers), Counter()))
        return list(next(answer.results for answer in answers if answer.results))


class _Head:
    """A head whose vocabulary matrix ranks hold between them."""

    def __init__(self, model: RankedModel, mtp: int | None) -> None:
        self.vocabulary = model.config.vocab_size
        self._model = model
        self._mtp = mtp

    def collapse(self, streams: torch.Tensor, ops: Operations | None = None) -> torch.Tensor:
        """As Head.collapse."""
        found: torch.Tensor = self._model.tell("collapse", self._mtp, streams, How.of(ops or self._model.ops))
        return found

    def pieces(self) -> Iterator[range]:
        """Rows of the vocabulary, as Head.pieces cuts it."""
        return vocabulary_pieces(self.vocabulary)

    def product(self, x: torch.Tensor, piece: Piece, ops: Operations | None = None) -> torch.Tensor:
        """As Head.product."""
        found = self._model.ask("product", self._mtp, x, piece, How.of(ops or self._model.ops))
        return torch.cat([columns for columns in found if columns is not None], 1)


def virtual_model(
    sharded: Sharded, arithmetic: Arithmetic, device: torch.device | str, config: V4Config | None = None
) -> RankedModel:
    """A sharded checkpoint whose ranks are threads of this process.

    Args:
        config: to run by, if not the checkpoint's own; of the same shapes.
    """
    config = config or sharded.config

    def worker(ranks: Ranks) -> RankWorker:
        return RankWorker(sharded.ranks[ranks.place.rank], arithmetic, device, config, ranks)

    return RankedModel(sharded, arithmetic, device, config, VirtualRanks(sharded.grid, worker))


@dataclass(frozen=True)
class _Setup:
    """What processes need to know to begin."""

    arithmetic: Arithmetic
    config: V4Config


def process_model(
    sharded: Sharded,
    arithmetic: Arithmetic,
    device: torch.device | str,
    processes: ProcessRanks,
    config: V4Config | None = None,
) -> RankedModel:
    """A sharded checkpoint whose ranks are processes, in the first of them; the others `serve_rank`.

    Args:
        device: of this process.
        config: to run by, if not the checkpoint's own; of the same shapes.
    """
    config = config or sharded.config
    own = RankWorker(sharded.ranks[0], arithmetic, device, config, processes.ranks)
    processes.start(_Setup(arithmetic, config), own)
    return RankedModel(sharded, arithmetic, device, config, processes)


def serve_rank(sharded: Sharded, device: torch.device | str, processes: ProcessRanks) -> None:
    """Be a rank of a model that the first process runs, until it is done."""
    tensors, ranks = sharded.ranks[processes.ranks.place.rank], processes.ranks

    def worker(setup: _Setup) -> RankWorker:
        return RankWorker(tensors, setup.arithmetic, device, setup.config, ranks)

    processes.serve(worker)


def model_of(
    source: Checkpoint | Sharded,
    arithmetic: Arithmetic,
    device: torch.device | str,
    *,
    config: V4Config | None = None,
    processes: ProcessRanks | None = None,
) -> AbstractContextManager[Model]:
    """A checkpoint ready to run: a whole one here, a sharded one by its ranks.

    Args:
        config: to run by, if not the checkpoint's own; of the same shapes.
        processes: a sharded one's ranks, of which this process is the first; None for threads of this process.

    Raises:
        CheckpointError: if the checkpoint has problems.
    """
    if not isinstance(source, Sharded):
        return StreamedModel(source, arithmetic, device, config=config)
    if processes is None:
        return virtual_model(source, arithmetic, device, config)
    return process_model(source, arithmetic, device, processes, config)
