"""Cut a checkpoint into the ranks of any grid: each rank a folder of safetensors, names and dtypes as released."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from v4quant.checkpoint.files import Files
from v4quant.checkpoint.grid import Grid, Place
from v4quant.checkpoint.header import TensorEntry, build_header, read_header
from v4quant.checkpoint.rank_tensors import RankTensors, Sharded
from v4quant.checkpoint.reader import Checkpoint, open_checkpoint
from v4quant.checkpoint.tp_rules import Split, split_of

_FILE = "model.safetensors"
GRIDS = {
    "tp2": Grid(2),
    "ep2": Grid(1, 2),
    "tp2 x ep2": Grid(2, 2),
    "pp2": Grid(1, 1, 2),
    "tp2 x pp2": Grid(2, 1, 2),
}


def cut(folder: Path, out: Path, grid: Grid) -> Sharded:
    """Write the ranks of a checkpoint, and open them."""
    source = open_checkpoint(folder)
    for place in grid.places:
        _write_rank(source, _rank_folder(out, place), place)
    return opened(folder, out, grid)


def opened(folder: Path, out: Path, grid: Grid) -> Sharded:
    """What `cut` wrote of a checkpoint."""
    source = open_checkpoint(folder)
    ranks = tuple(_open_rank(source, _rank_folder(out, place), place) for place in grid.places)
    return Sharded(str(out), grid, source.config, source.scheme, ranks, source.source_id(), {})


def _rank_folder(out: Path, place: Place) -> Path:
    return out / f"rank-{place.rank:03}"


def _open_rank(source: Checkpoint, folder: Path, place: Place) -> RankTensors:
    files = Files(folder)
    _, held = read_header(_FILE, files.size(_FILE), lambda start, stop: files.read(_FILE, start, stop))
    parsed = {name: source.parsed[name] for name in held}
    return RankTensors(place, files, held, parsed, source.scheme, source.config, source.source_id())


def _write_rank(source: Checkpoint, out: Path, place: Place) -> None:
    shares = {entry: share for entry in source.tensors.values() if (share := _share(source, entry, place))}
    tensors = [(entry.name, entry.dtype, shape) for entry, (shape, _) in shares.items()]
    data = {entry.name: share.tobytes() for entry, (_, share) in shares.items()}
    header, entries = build_header(tensors, file=_FILE)
    out.mkdir(parents=True)
    (out / _FILE).write_bytes(header + b"".join(data[entry.name] for entry in entries))


def _share(
    source: Checkpoint, entry: TensorEntry, place: Place
) -> tuple[tuple[int, ...], npt.NDArray[np.uint8]] | None:
    """Shape and bytes of what a rank holds of a tensor; None for nothing."""
    name, grid = source.parsed[entry.name], place.grid
    split = split_of(name)
    if place.stage not in grid.stages(name, source.config) or split is Split.LEFT_OUT:
        return None
    if split is Split.EXPERT and name.expert not in place.experts(source.config.n_routed_experts):
        return None
    data = np.frombuffer(source.files.read(entry.file, entry.start, entry.stop), np.uint8)
    if split not in (Split.ROWS, Split.COLUMNS):
        return entry.shape, data
    axis = 0 if split is Split.ROWS else 1
    shape = (*entry.shape[:axis], entry.shape[axis] // grid.tp, *entry.shape[axis + 1 :])
    rows = data.reshape(entry.shape[0], -1)
    return shape, np.split(rows, grid.tp, axis)[place.tp_rank]
