"""What one rank does of a model that ranks share: it is asked, as all ranks are, and computes with those of its stage.

    embed                     first stage    rows of the embedding, each from the rank that has it
    begin, take               the layer's    a block; layers in order, each read while the one before is computed
    mtp_inputs, take "mtp"    last stage
    collapse, product         last stage     the head; each rank answers for its rows of the vocabulary

Of what all ranks of a stage know the stage's first one tells.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from typing import Any

import torch

from v4quant.checkpoint.sharding.rank_copies import Copies, RankWeights
from v4quant.checkpoint.sharding.rank_tensors import RankTensors
from v4quant.config import V4Config
from v4quant.model.arithmetic import Arithmetic
from v4quant.model.block import Block
from v4quant.model.counted import Counted
from v4quant.model.head import Head
from v4quant.model.operations import Operations
from v4quant.model.ranks import Ranks
from v4quant.model.reordered import Reordered
from v4quant.model.streaming import BlockResult, Pass, Schedule, StreamedModel, take


class How(StrEnum):
    """Operations by name: objects of one process are of no use to another."""

    PLAIN = "plain"
    COUNTED = "counted"
    REORDERED = "reordered"

    @classmethod
    def of(cls, ops: Operations) -> "How":
        """The name of these operations."""
        if isinstance(ops, Counted):
            return cls.COUNTED
        return cls.REORDERED if isinstance(ops, Reordered) else cls.PLAIN


@dataclass(frozen=True)
class Order:
    """What every rank is asked.

    Attributes:
        what: a method of RankWorker, one of ORDERS.
        arguments: its arguments.
    """

    what: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    """What a rank says.

    Attributes:
        value: None where it has nothing to say.
        bytes_read: stored bytes of weights that it has read so far.
        copies: what it has read since its last answer of tensors that other ranks hold, too.
    """

    value: Any
    bytes_read: int
    copies: Copies


@dataclass(frozen=True)
class RankPass:
    """A pass, as ranks are asked for it; see streaming.Pass."""

    how: How
    streams: torch.Tensor
    schedule: Schedule


@dataclass(frozen=True)
class Taken:
    """What a rank made of a block.

    Attributes:
        results: of each pass; () where another rank of the stage tells.
        counts: what each pass executed here, where it was counted.
    """

    results: tuple[BlockResult, ...]
    counts: tuple[Counter[str], ...]


class RankWorker:
    """A rank."""

    def __init__(
        self,
        tensors: RankTensors,
        arithmetic: Arithmetic,
        device: torch.device | str,
        config: V4Config,
        ranks: Ranks,
    ) -> None:
        """Prepare; no weights are read yet.

        Args:
            tensors: what it holds.
            config: to run by.
            ranks: those that it computes with.
        """
        self._place = tensors.place
        self._model = StreamedModel(tensors, arithmetic, device, config=config, ranks=ranks)
        self._layers: Iterator[Block] = iter(())
        self._block: tuple[str, int, Block] | None = None
        self._heads: dict[int | None, Head] = {}
        self._piece: tuple[range, torch.Tensor] | None = None

    def close(self) -> None:
        """Give back its threads."""
        self._model.__exit__()

    def do(self, order: Order) -> Answer:
        """Do what is asked."""
        assert order.what in ORDERS
        value = getattr(self, order.what)(*on_device(order.arguments, self._model.device))
        weights = self._model.reader.weights
        assert isinstance(weights, RankWeights)
        return Answer(on_device(value, torch.device("cpu")), self._model.bytes_read, weights.take_copies())

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Streams before layer 0, [T, S, d]."""
        if self._place.stage:
            return None
        streams = self._model.embed(input_ids)
        return streams if self._tells else None

    def begin(self, first: int, stop: int) -> None:
        """Get ready for layers first to stop - 1."""
        own = self._place.layers(self._model.config.num_hidden_layers)
        self._block = None
        self._layers = self._model.blocks(max(first, own.start), min(stop, own.stop))

    def take(self, kind: str, index: int, passes: Sequence[RankPass]) -> Taken | None:
        """Take runs through a block; layers in order."""
        config, grid = self._model.config, self._place.grid
        is_layer = kind == "layers"
        stage = grid.stage_of_layer(index, config.num_hidden_layers) if is_layer else grid.pp - 1
        if self._place.stage != stage:
            return None
        block = self._at(kind, index)
        ops = [self._ops(own.how) for own in passes]
        results = take(block, [Pass(how, own.streams, own.schedule) for how, own in zip(ops, passes, strict=True)])
        counts = tuple(own.take() if isinstance(own, Counted) else Counter[str]() for own in ops)
        return Taken(tuple(results) if self._tells else (), counts)

    def mtp_inputs(
        self, index: int, runs: Sequence[tuple[torch.Tensor, How]], next_ids: torch.Tensor
    ) -> list[torch.Tensor] | None:
        """What goes into an MTP block, [T, S, d] of each run."""
        if not self._is_last:
            return None
        pairs = [(streams, self._ops(how)) for streams, how in runs]
        found = self._model.mtp_inputs(index, pairs, next_ids)
        return found if self._tells else None

    def collapse(self, mtp: int | None, streams: torch.Tensor, how: How) -> torch.Tensor | None:
        """What streams bring to the vocabulary matrix, float32 [T, d]."""
        return self._head(mtp).collapse(streams, self._ops(how)) if self._is_last and self._tells else None

    def product(self, mtp: int | None, x: torch.Tensor, piece: range, how: How) -> torch.Tensor | None:
        """Logits of the rows of a piece that this rank holds, float32 [T, held]; where ranks hold copies, of one."""
        if not self._is_last:
            return None
        head = self._head(mtp)
        if self._piece is None or self._piece[0] != piece:
            self._piece = None  # before the next one is read
            self._piece = piece, head.rows(piece)
        return None if self._place.ep_rank else head.product(x, self._piece[1], self._ops(how))

    @property
    def _is_last(self) -> bool:
        return self._place.stage == self._place.grid.pp - 1

    @property
    def _tells(self) -> bool:
        """Whether it is the first rank of its stage."""
        return self._place.expert_share == 0

    def _ops(self, how: How) -> Operations:
        if how is How.COUNTED:
            return Counted(self._model.config)
        return Reordered(self._model.config) if how is How.REORDERED else self._model.ops

    def _head(self, mtp: int | None) -> Head:
        if mtp not in self._heads:
            self._heads[mtp] = self._model.head(mtp)
        return self._heads[mtp]

    def _at(self, kind: str, index: int) -> Block:
        """A block, the next layer or one that is here already."""
        if self._block is None or self._block[:2] != (kind, index):
            self._block = None  # before the next one arrives
            block = next(self._layers) if kind == "layers" else self._model.mtp_block(index)
            self._block = kind, index, block
        return self._block[2]


ORDERS = ("embed", "begin", "take", "mtp_inputs", "collapse", "product")


def on_device(value: Any, device: torch.device) -> Any:
    """The same nested value with every tensor in it on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        moved = (on_device(own, device) for own in value)
        return list(moved) if isinstance(value, list) else tuple(moved)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: on_device(getattr(value, item.name), device) for item in fields(value)})
    return value
