"""Cut a checkpoint into the ranks of grids of every kind, a folder each."""

from pathlib import Path

from tests.checkpoint.sharding import split
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.checkpoint.sharding.rank_tensors import Sharded, open_ranks

GRIDS = {
    "tp2": Grid(2),
    "ep2": Grid(1, 2),
    "tp2 x ep2": Grid(2, 2),
    "pp2": Grid(1, 1, 2),
    "tp2 x pp2": Grid(2, 1, 2),
}


def cut(folder: Path, out: Path, grid: Grid) -> Sharded:
    """Write the ranks of a checkpoint, and open them."""
    split(folder, out, grid)
    return open_ranks(out)
