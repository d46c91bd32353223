"""Ranks that compute a block together, each with its share of the weights: what they tell each other on the way.

    tensor group   ranks between which dense parts are cut: products with wo_b, rows of the embedding, indexer heads
    stage group    all ranks of a stage: sums over routed experts

Every rank runs the same code on its own weights, so all make the same calls in the same order. Sums are taken in rank
order, in FP32, by every rank for itself, so that they are the same bits in each, however the ranks are connected.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from v4quant.checkpoint.sharding.grid import Grid, Place

Take = Callable[[list[torch.Tensor]], torch.Tensor]


class RankLostError(Exception):
    """Another rank of the run has ended; what it said is the reason, this is not."""


class Group(ABC):
    """Ranks that compute something together.

    Attributes:
        rank: this one's number among them.
        size: how many there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    @abstractmethod
    def gather(self, x: torch.Tensor, take: Take) -> torch.Tensor:
        """What `take` makes of the tensors of all ranks, in rank order, all of one shape and dtype.

        It may not keep them: they are the other ranks' own.

        Raises:
            RankLostError: if another rank has ended.
        """

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in rank order: float32 [...] of floating-point [...]; of one rank its own float32."""
        return self.gather(x, _sum) if self.size > 1 else x.float()

    def join(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The tensors of all ranks side by side along an axis, in rank order."""
        return self.gather(x, lambda parts: torch.cat(parts, axis)) if self.size > 1 else x

    def agreed(self, x: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor, where all should have the same but may differ in last bits."""
        return self.gather(x, lambda parts: parts[0].clone()) if self.size > 1 else x


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].to(torch.float32, copy=True)
    for part in parts[1:]:
        total += part
    return total


class Alone(Group):
    """A group of one."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def gather(self, x: torch.Tensor, take: Take) -> torch.Tensor:
        """What `take` makes of its own."""
        return take([x])


@dataclass(frozen=True)
class Ranks:
    """A rank, and those that it computes with.

    Attributes:
        place: of this rank.
        tensor: ranks with the same share of experts' copies, between which dense parts are cut.
        stage: all ranks of its stage.
    """

    place: Place
    tensor: Group
    stage: Group


ALONE = Alone()
ONE_RANK = Ranks(Grid(1).place(0), ALONE, ALONE)
