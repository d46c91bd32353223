"""How ranks share a model: a grid of tensor-parallel, expert-parallel and pipeline positions.

    rank = (stage * ep + ep_rank) * tp + tp_rank
    dense parts   cut into tp shares (sharding/rules.py); the ep ranks with the same tp_rank hold copies
    experts       tp * ep shares of whole experts; share ep_rank * tp + tp_rank holds its E / (tp * ep) in order
    layers        pp stages of layers in order, the first L mod pp stages with one more than the others
    embedding     in the first stage, and in the last where it has MTP blocks, which embed tokens too
    head          in the last stage, with final norm and MTP blocks

DeepSeek's tensor-parallel layout is the grid with ep = pp = 1.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from v4quant.names import Role, TensorName

MAX_RANKS = 1024


@dataclass(frozen=True)
class Grid:
    """How many ranks there are of each kind.

    Attributes:
        tp: shares that dense parts are cut into.
        ep: copies of each dense share, between which experts are shared out further.
        pp: stages of layers.
    """

    tp: int
    ep: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return self.tp * self.ep * self.pp

    @property
    def expert_shares(self) -> int:
        """Shares that the experts of a layer are cut into."""
        return self.tp * self.ep

    def place(self, rank: int) -> "Place":
        """Where a rank stands, 0 to ranks - 1."""
        stage, within = divmod(rank, self.expert_shares)
        ep_rank, tp_rank = divmod(within, self.tp)
        return Place(self, rank, tp_rank, ep_rank, stage)

    @cached_property
    def places(self) -> tuple["Place", ...]:
        """Every rank's place, in rank order."""
        return tuple(self.place(rank) for rank in range(self.ranks))

    def stage_of_layer(self, layer: int, layers: int) -> int:
        """The stage that holds a layer of so many."""
        each, more = divmod(layers, self.pp)
        wide = more * (each + 1)  # layers in the stages that have one more
        return layer // (each + 1) if layer < wide else more + (layer - wide) // each

    def stages(self, name: TensorName, layers: int, *, has_mtp: bool) -> tuple[int, ...]:
        """The stages that hold a tensor, in order, of a model with so many layers."""
        if name.block == "layers":
            return (self.stage_of_layer(name.index, layers),)
        last = self.pp - 1
        if name.role is Role.EMBEDDING:
            return (0, last) if has_mtp and last else (0,)
        return (last,)

    def holders(
        self, stages: tuple[int, ...], tp_rank: int | None = None, expert_share: int | None = None
    ) -> tuple[int, ...]:
        """Ranks of these stages, in order; those with one tp_rank or expert share alone, where it is given."""
        return _holders(self, stages, tp_rank, expert_share)

    def __str__(self) -> str:
        """As the command line writes it."""
        return f"--tp {self.tp} --ep {self.ep} --pp {self.pp}"


@dataclass(frozen=True)
class Place:
    """A rank's place in a grid.

    Attributes:
        grid: the grid.
        rank: its number.
        tp_rank, ep_rank, stage: its coordinates.
    """

    grid: Grid
    rank: int
    tp_rank: int
    ep_rank: int
    stage: int

    @property
    def expert_share(self) -> int:
        """Which of the grid's shares of experts it holds."""
        return self.ep_rank * self.grid.tp + self.tp_rank

    def experts(self, count: int) -> range:
        """The experts that it holds of so many in a layer of its stage."""
        each = count // self.grid.expert_shares
        return range(self.expert_share * each, (self.expert_share + 1) * each)

    def layers(self, count: int) -> range:
        """The layers that it holds of so many."""
        return stage_layers(self.stage, self.grid.pp, count)

    def stage_ranks(self) -> range:
        """The ranks of its stage: those that compute a layer together."""
        first = self.stage * self.grid.expert_shares
        return range(first, first + self.grid.expert_shares)


def stage_layers(stage: int, stages: int, layers: int) -> range:
    """The layers of a stage."""
    each, more = divmod(layers, stages)
    first = stage * each + min(stage, more)
    return range(first, first + each + (stage < more))


@lru_cache(maxsize=4096)
def _holders(grid: Grid, stages: tuple[int, ...], tp_rank: int | None, expert_share: int | None) -> tuple[int, ...]:
    """See Grid.holders; asked anew for every tensor."""
    return tuple(
        place.rank
        for place in grid.places
        if place.stage in stages and tp_rank in (None, place.tp_rank) and expert_share in (None, place.expert_share)
    )
