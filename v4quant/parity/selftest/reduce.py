"""A small sound checkpoint out of a large one: the user's own tensors as stored, few enough to try faults on.

Kept are one layer of each compression ratio, a hash-routed and a score-routed one among them, the first MTP block where
it can be run, some experts, some vocabulary and some of the indexer's picks; every other dimension stays. So each kept
tensor has the bytes of a source tensor or of its first rows; only the expert numbers in hash tables are new.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.index import INDEX_NAME, build_index
from v4quant.checkpoint.layout import HeaderTensor, Shard, lay_out
from v4quant.checkpoint.output import make_room, require_free, write_file
from v4quant.checkpoint.reader import Checkpoint
from v4quant.config import CONFIG_NAME, V4Config
from v4quant.model.mtp import runnable_mtp_blocks
from v4quant.names import Role, TensorName, in_block, scale_name

Advance = Callable[[int, str], None]

MAX_EXPERTS = 8
MAX_VOCABULARY = 512
# Picks of the indexer: a prompt of a few hundred tokens makes it choose.
MAX_INDEX_TOPK = 16
# A router that must pick every expert cannot pick wrong ones.
SPARE_EXPERTS = 2
_MAX_SHARD_BYTES = 2**62  # one block a file, however large
_READ_BYTES = 4 * 2**20
_VOCABULARY_ROWS = {Role.EMBEDDING, Role.HEAD, Role.MTP_EMBEDDING, Role.MTP_HEAD, Role.HASH_TABLE}


@dataclass(frozen=True)
class Reduction:
    """What is kept of a model.

    Attributes:
        layers: numbers in the source of the layers that become 0, 1, 2, ...
        mtp_blocks: 1 if the first MTP block is kept, else 0.
        experts: routed experts kept in each block: 0 to experts - 1.
        vocabulary: token ids kept: 0 to vocabulary - 1.
    """

    layers: tuple[int, ...]
    mtp_blocks: int
    experts: int
    vocabulary: int


def plan_reduction(
    config: V4Config, *, max_experts: int = MAX_EXPERTS, max_vocabulary: int = MAX_VOCABULARY
) -> Reduction:
    """Choose what to keep of a model.

    Args:
        max_experts: routed experts to keep at most, though always SPARE_EXPERTS more than a token picks.
        max_vocabulary: token ids to keep at most.
    """
    layers: list[int] = []
    seen: set[int | str] = set()
    for layer, ratio in enumerate(config.compress_ratios[: config.num_hidden_layers]):
        kinds = {ratio, "hash" if layer < config.num_hash_layers else "score"}
        if not kinds <= seen:
            layers.append(layer)
            seen |= kinds
    return Reduction(
        tuple(layers),
        min(runnable_mtp_blocks(config), 1),
        min(config.n_routed_experts, max(max_experts, config.num_experts_per_tok + SPARE_EXPERTS)),
        min(config.vocab_size, max_vocabulary),
    )


def _ignore(_count: int, _file: str) -> None:
    """Report progress to nobody."""


def reduce_checkpoint(
    source: Checkpoint,
    out: Path,
    *,
    max_experts: int = MAX_EXPERTS,
    max_vocabulary: int = MAX_VOCABULARY,
    progress: Advance = _ignore,
) -> Reduction:
    """Write a small checkpoint of some of a checkpoint's tensors; config.json comes last.

    Args:
        source: the checkpoint; sound.
        out: folder to write into, made if missing.
        max_experts, max_vocabulary: as plan_reduction takes them.
        progress: told bytes written, and into which file.

    Returns:
        What was kept.

    Raises:
        CheckpointError: if the source has problems, or cannot be read.
        OutputError: if out is not empty, or the disk is too small or refuses.
    """
    source.require_sound()
    reduction = plan_reduction(source.config, max_experts=max_experts, max_vocabulary=max_vocabulary)
    kept = {cut.name: cut for cut in _cuts(source, reduction)}
    shards = lay_out(_units(kept), _MAX_SHARD_BYTES)
    total = sum(cut.bytes for cut in kept.values())
    require_free(out, overwrite=False)
    make_room(out, sum(shard.file_bytes for shard in shards))
    for shard in shards:
        write_file(out / shard.name, _chunks(source, shard, kept, reduction, progress))
    index = build_index({name: shard.name for shard in shards for name in shard.entries}, total)
    write_file(out / INDEX_NAME, [index])
    write_file(out / CONFIG_NAME, [config_bytes(_config_json(source, reduction))])
    return reduction


def config_bytes(config_json: dict[str, Any]) -> bytes:
    """A config.json as it is written."""
    return (json.dumps(config_json, indent=2) + "\n").encode()


@dataclass(frozen=True)
class _Cut:
    """The first rows of a source tensor, under a new name.

    Attributes:
        name: in the small checkpoint.
        source: the tensor there.
        shape: header shape of what is kept.
        is_table: whether it is a hash table, whose experts are numbered anew.
    """

    name: str
    source: TensorEntry
    shape: tuple[int, ...]
    is_table: bool

    @property
    def bytes(self) -> int:
        """Bytes kept."""
        return self.source.bytes // self.source.shape[0] * self.shape[0]


def _cuts(source: Checkpoint, reduction: Reduction) -> Iterator[_Cut]:
    """Every tensor that is kept, in release order, each scale after its weight."""
    for tensor in source.logical:
        names = [tensor.name, scale_name(tensor.name)] if tensor.kind != "plain" else [tensor.name]
        for entry in (source.tensors[name] for name in names if name in source.tensors):
            parts = source.parsed[entry.name]
            name = _new_name(parts, reduction)
            if name:
                rows = _rows(parts.role, entry.shape[0], reduction)
                yield _Cut(name, entry, (rows, *entry.shape[1:]), parts.role is Role.HASH_TABLE)


def _new_name(parts: TensorName, reduction: Reduction) -> str:
    """Name of a tensor in the small checkpoint; "" if it is left out."""
    if parts.expert >= reduction.experts:
        return ""
    if parts.block == "layers":
        return in_block(parts, reduction.layers.index(parts.index)) if parts.index in reduction.layers else ""
    return "" if parts.block == "mtp" and parts.index >= reduction.mtp_blocks else parts.name


def _rows(role: Role, rows: int, reduction: Reduction) -> int:
    if role in _VOCABULARY_ROWS:
        return reduction.vocabulary
    return reduction.experts if role is Role.ROUTER else rows


def _units(kept: dict[str, _Cut]) -> Iterator[tuple[HeaderTensor, ...]]:
    return (((cut.name, cut.source.dtype, cut.shape),) for cut in kept.values())


def _chunks(
    source: Checkpoint, shard: Shard, kept: dict[str, _Cut], reduction: Reduction, progress: Advance
) -> Iterator[bytes]:
    """The bytes of a file, a piece at a time."""
    yield shard.header
    for name in shard.entries:
        cut = kept[name]
        if cut.is_table and reduction.experts < source.config.n_routed_experts:
            start = cut.source.start
            stored = bytearray(source.files.read(cut.source.file, start, start + cut.bytes))
            table = torch.frombuffer(stored, dtype=torch.int64).view(cut.shape)
            yield renumber_picks(table, reduction.experts).numpy().tobytes()
            progress(cut.bytes, shard.name)
            continue
        for start in range(cut.source.start, cut.source.start + cut.bytes, _READ_BYTES):
            stop = min(start + _READ_BYTES, cut.source.start + cut.bytes)
            yield source.files.read(cut.source.file, start, stop)
            progress(stop - start, shard.name)


def renumber_picks(table: torch.Tensor, experts: int) -> torch.Tensor:
    """Number the experts of a hash table modulo those that are kept, the picks of a token distinct.

    Args:
        table: int64 [V, k].
        experts: those kept, at least k.

    Returns:
        int64 [V, k]; where a number is taken already, the next one that is free.
    """
    picks = table % experts
    for column in range(1, picks.shape[1]):
        while True:
            taken = (picks[:, :column] == picks[:, column, None]).any(dim=1)  # [V]
            if not bool(taken.any()):
                break
            picks[taken, column] = (picks[taken, column] + 1) % experts
    return picks


def _config_json(source: Checkpoint, reduction: Reduction) -> dict[str, Any]:
    """The source's config.json, in the words of the small model; keys keep their order."""
    config = {key: value for key, value in source.config_json.items() if not key.startswith("dspark_")}
    ratios = [source.config.compress_ratios[layer] for layer in reduction.layers]
    return config | {
        "num_hidden_layers": len(reduction.layers),
        "num_hash_layers": sum(layer < source.config.num_hash_layers for layer in reduction.layers),
        "compress_ratios": ratios + [0] * reduction.mtp_blocks,
        "num_nextn_predict_layers": reduction.mtp_blocks,
        "n_routed_experts": reduction.experts,
        "vocab_size": reduction.vocabulary,
        "index_topk": min(source.config.index_topk, MAX_INDEX_TOPK),
    }
