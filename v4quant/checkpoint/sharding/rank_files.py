"""The files of a sharded checkpoint: names, headers, and the marks by which each tells whose it is.

Every file names its run, its rank and the number of ranks in `__metadata__`, which loaders skip: a file of another run,
or of another rank under this one's name, is found by its header.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from v4quant.checkpoint.header import TensorEntry, build_header
from v4quant.checkpoint.layout import HeaderTensor, Packing, Shard, block_key, lay_out
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.checkpoint.sharding.rules import Layout
from v4quant.names import scale_name

EXTRA_NAME = "v4quant.extra.safetensors"
HEADER_PREFIX = "header/"
FILE_PREFIX = "file/"
RUN_KEY, RANK_KEY, RANKS_KEY = "v4quant.run", "v4quant.rank", "v4quant.ranks"
# Blocks in the order of released files.
_BLOCKS = ("embed", "layers", "tail", "mtp")


@dataclass(frozen=True)
class Run:
    """What a checkpoint is laid out for.

    Attributes:
        grid: the ranks.
        layout: how their files lie on disk.
        fp8_experts: cast FP4 experts to FP8; in DeepSeek's layout alone.
        max_shard_bytes: payload limit of a file; in rank folders alone.
        packing: how tensors are packed into files; in rank folders alone.
        source: what tells the checkpoint from others: a hash over its headers and a sample of its data.
    """

    grid: Grid
    layout: Layout
    source: str
    fp8_experts: bool = False
    max_shard_bytes: int = 0
    packing: Packing = Packing.LAYER

    @property
    def id(self) -> str:
        """What tells the files of this run from those of another checkpoint or of other options."""
        grid = self.grid
        told = [self.source, self.layout, grid.tp, grid.ep, grid.pp, self.fp8_experts]
        told += [self.max_shard_bytes, self.packing]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def rank_file(rank: int, ranks: int) -> str:
    """Name of a rank's file in DeepSeek's layout."""
    return f"model{rank}-mp{ranks}.safetensors"


def rank_folder(rank: int) -> str:
    """Name of a rank's folder."""
    return f"rank-{rank:03d}"


def files_of_rank(rank: int, tensors: Sequence[HeaderTensor], run: Run) -> list[Shard]:
    """The files that hold these tensors of a rank."""
    ranks = run.grid.ranks
    metadata = {RUN_KEY: run.id, RANK_KEY: str(rank), RANKS_KEY: str(ranks)}
    if run.layout is Layout.DEEPSEEK:
        return [_file(rank_file(rank, ranks), tensors, metadata)]
    folder = f"{rank_folder(rank)}/"
    return lay_out(_units(tensors), run.max_shard_bytes, run.packing, folder=folder, metadata=metadata)


def _units(tensors: Iterable[HeaderTensor]) -> list[tuple[HeaderTensor, ...]]:
    """Weights, each with its scale, block by block."""
    of_name = {tensor[0]: tensor for tensor in tensors}
    scale_of = {name: scale_name(name) for name in of_name if name.endswith(".weight")}
    scale_of = {name: scale for name, scale in scale_of.items() if scale in of_name}
    scales = set(scale_of.values())
    units = [
        (tensor, of_name[scale_of[name]]) if name in scale_of else (tensor,)
        for name, tensor in of_name.items()
        if name not in scales
    ]
    return sorted(units, key=lambda unit: _block_order(unit[0][0]))


def _block_order(name: str) -> tuple[int, int]:
    block, index = block_key(name)
    return _BLOCKS.index(block), index


@dataclass(frozen=True)
class ExtraTensors:
    """What the extra file holds of a checkpoint whatever the layout.

    Attributes:
        headers: weight file -> bytes of its header.
        files: file without weights -> its bytes.
    """

    headers: Mapping[str, int]
    files: Mapping[str, int]

    def file(self, kept: Iterable[TensorEntry], run: Run) -> Shard:
        """The extra file, with these tensors beside."""
        tensors: list[HeaderTensor] = [(HEADER_PREFIX + name, "U8", (size,)) for name, size in self.headers.items()]
        tensors += [(FILE_PREFIX + name, "U8", (size,)) for name, size in self.files.items()]
        tensors += [(entry.name, entry.dtype, entry.shape) for entry in kept]
        return _file(EXTRA_NAME, tensors, {RUN_KEY: run.id, RANKS_KEY: str(run.grid.ranks)})


def _file(name: str, tensors: Iterable[HeaderTensor], metadata: Mapping[str, str]) -> Shard:
    header, entries = build_header(tensors, file=name, metadata=metadata)
    file_bytes = max((entry.stop for entry in entries), default=len(header))
    return Shard(name, header, {entry.name: entry for entry in entries}, file_bytes)
