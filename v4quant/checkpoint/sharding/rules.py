"""How ranks share the tensors of a model, and which grids of ranks (grid.py) that allows.

    vocabulary   embed, head and DSpark's Markov tables by rows
    heads        wq_b and attn_sink by whole heads; the indexer's wq_b and weights_proj by whole indexer heads
    groups       wo_a by rows and wo_b by columns, whole groups of o_lora_rank each
    experts      share i holds the routed experts i * E/N to (i + 1) * E/N - 1
    all else     in every rank of its stage, shared experts and compressors included

A scale is cut like its weight. DeepSeek's tensor-parallel files differ in two things: they leave out the MTP blocks'
own embedding and head, as that code uses the trunk's, and hold wo_a in BF16, so that its scale blocks forbid nothing.
Sources: `inference/convert.py` and `model.py` of the April releases; the Markov tables as in those of 0731, whose
`model.py` makes them vocabulary-parallel.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from v4quant.checkpoint.reader import Checkpoint
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.config import V4Config
from v4quant.inventory import LogicalTensor
from v4quant.names import Role, TensorName

# Numbers of tensor-parallel shares that are looked at where those that work are listed.
MOST_RANKS_LISTED = 64


class Layout(StrEnum):
    """How a sharded checkpoint lies on disk."""

    DEEPSEEK = "deepseek"
    """model{i}-mp{N}.safetensors, as DeepSeek's inference code loads them: a grid with ep = pp = 1."""

    RANKS = "ranks"
    """A folder for each rank of a grid, with tensors named and stored as in the checkpoint."""


class Split(Enum):
    """What a rank holds of a tensor."""

    WHOLE = auto()  # all of it, as every rank of the stage
    ROWS = auto()  # an equal share of its rows, in the order of tensor-parallel ranks
    COLUMNS = auto()  # an equal share of its columns
    EXPERT = auto()  # all of it, in the one rank of the stage that has this expert
    LEFT_OUT = auto()  # nothing


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a grid does not work.

    Attributes:
        tensor: the first tensor that forbids it.
        reason: what does not fit, with numbers.
    """

    tensor: str
    reason: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.reason}"


_ROLES = {
    Role.EMBEDDING: Split.ROWS,
    Role.HEAD: Split.ROWS,
    Role.MARKOV_HEAD: Split.ROWS,
    Role.MTP_EMBEDDING: Split.ROWS,
    Role.MTP_HEAD: Split.ROWS,
    Role.ROUTED_EXPERTS: Split.EXPERT,
}
_MODULES = {
    "attn.wq_b": Split.ROWS,
    "attn.wo_a": Split.ROWS,
    "attn.wo_b": Split.COLUMNS,
    "attn.indexer.wq_b": Split.ROWS,
    "attn.indexer.weights_proj": Split.ROWS,
}
OUTPUT_A = "attn.wo_a"  # in BF16 in DeepSeek's layout, whatever it is stored as


def split_of(name: TensorName, layout: Layout) -> Split:
    """What a rank holds of this tensor."""
    if layout is Layout.DEEPSEEK and name.role in (Role.MTP_EMBEDDING, Role.MTP_HEAD):
        return Split.LEFT_OUT
    if name.leaf == "attn_sink":
        return Split.ROWS
    return _MODULES.get(name.module) or _ROLES.get(name.role, Split.WHOLE)


def obstacles(source: Checkpoint, grid: Grid, layout: Layout) -> list[Obstacle]:
    """Everything that forbids a grid, one entry a kind of tensor; empty where it works.

    Args:
        source: a sound checkpoint.
    """
    found: list[Obstacle] = []
    layers = source.config.num_hidden_layers
    if grid.pp > layers:
        found.append(Obstacle(source.logical[0].name, f"{layers:,} layers do not fill {grid.pp} stages"))
    for tensor, name in _kinds(source):
        split = split_of(name, layout)
        if split not in (Split.WHOLE, Split.LEFT_OUT):
            shares = grid.expert_shares if split is Split.EXPERT else grid.tp
            count, what = _counted(source.config, name)
            if count % shares:
                found.append(Obstacle(tensor.name, f"{count:,} {what} do not divide by {shares}"))
            elif reason := _cut_block(source, tensor, name, split, grid.tp, layout):
                found.append(Obstacle(tensor.name, reason))
    return found


def working_shares(source: Checkpoint, grid: Grid, layout: Layout) -> list[int]:
    """The numbers of tensor-parallel shares up to MOST_RANKS_LISTED that work in a grid that is otherwise this."""
    numbers = range(1, MOST_RANKS_LISTED + 1)
    return [tp for tp in numbers if not obstacles(source, Grid(tp, grid.ep, grid.pp), layout)]


def _kinds(source: Checkpoint) -> Iterator[tuple[LogicalTensor, TensorName]]:
    """The first tensor of each module: all blocks of a sound checkpoint have the same dimensions."""
    seen: set[tuple[str, str]] = set()
    for tensor in source.logical:
        name = source.parsed[tensor.name]
        kind = (name.module, name.leaf)
        if kind not in seen:
            seen.add(kind)
            yield tensor, name


def _counted(config: V4Config, name: TensorName) -> tuple[int, str]:
    """What is shared out of a split tensor: how many, and what they are."""
    if name.role is Role.ROUTED_EXPERTS:
        return config.n_routed_experts, "routed experts"
    if name.role is Role.INDEXER:
        return config.index_n_heads, "indexer heads"
    if name.module in (OUTPUT_A, "attn.wo_b"):
        return config.o_groups, "output groups"
    if name.role is Role.ATTENTION:
        return config.num_attention_heads, "attention heads"
    return config.vocab_size, "tokens of the vocabulary"


def _cut_block(
    source: Checkpoint, tensor: LogicalTensor, name: TensorName, split: Split, shares: int, layout: Layout
) -> str:
    """Say how equal shares cut a scale block of a matrix; "" where they do not.

    One share cuts nothing, so edge blocks do no harm; of several, every one must be whole blocks.
    """
    if tensor.kind == "plain" or split is Split.EXPERT or shares == 1:
        return ""
    if layout is Layout.DEEPSEEK and name.module == OUTPUT_A:
        return ""
    block = source.scheme.encoding(tensor.kind).block
    axis = 0 if split is Split.ROWS else 1
    if block is None or tensor.shape[axis] // shares % block[axis] == 0:
        return ""
    what = "rows" if axis == 0 else "columns"
    return (
        f"a rank's {tensor.shape[axis] // shares:,} of {tensor.shape[axis]:,} {what} are no whole number of scale "
        f"blocks of {block.rows}x{block.columns}"
    )
