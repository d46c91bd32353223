"""Which tensor goes into which output file: one block a shard as released, files filled to the limit, or one file.

Source of the released layout: the index files of the April releases: embedding, one shard a layer, then
final norm and head together, then one shard an MTP block.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from v4quant.checkpoint.header import TensorEntry, build_header
from v4quant.dtypes import payload_bytes
from v4quant.names import Role, TensorName, parse_name

HeaderTensor = tuple[str, str, tuple[int, ...]]  # name, dtype, header shape
# What loaders look for where there is one file: huggingface_hub's SAFETENSORS_SINGLE_FILE.
SINGLE_FILE = "model.safetensors"


class Packing(StrEnum):
    """How tensors are packed into files; a weight and its scale stay together in each."""

    LAYER = "layer"  # one block a file, as released; a block above the limit is split
    FULL = "full"  # every file is filled up to the limit, whatever the block, as save_pretrained does
    ONE = "one"  # a single file, without a limit


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its header bytes, and where each tensor lies."""

    name: str
    header: bytes
    entries: dict[str, TensorEntry]
    file_bytes: int


def block_key(name: str) -> tuple[str, int]:
    """The shard group of a tensor: ("embed", 0), ("layers", 7), ("tail", 0) or ("mtp", 0)."""
    parsed = parse_name(name)
    assert parsed is not None, f"{name} passed the audit, so it is a V4 name"
    return _block_of(parsed)


def _block_of(parsed: TensorName) -> tuple[str, int]:
    if parsed.block:
        return (parsed.block, parsed.index)
    return ("embed", 0) if parsed.role == Role.EMBEDDING else ("tail", 0)


def lay_out(
    units: Iterable[tuple[HeaderTensor, ...]],
    max_shard_bytes: int,
    packing: Packing = Packing.LAYER,
    *,
    folder: str = "",
    metadata: Mapping[str, str] | None = None,
) -> list[Shard]:
    """Place tensors into shards.

    Args:
        units: tensors that stay together in one file (a weight and its scale), in release order.
        max_shard_bytes: payload limit of a file, which Packing.ONE does not keep; a single unit above it gets a file
            of its own.
        packing: which units may share a file.
        folder: what stands before each file's name, with its slash.
        metadata: of every file.

    Returns:
        Shards in order, named model-00001-of-000NN.safetensors, or model.safetensors under Packing.ONE.
    """
    groups: list[list[HeaderTensor]] = []
    block, used = None, 0
    for unit in units:
        size = sum(payload_bytes(dtype, shape) for _, dtype, shape in unit)
        unit_block = block_key(unit[0][0]) if packing is Packing.LAYER else None
        is_full = packing is not Packing.ONE and used + size > max_shard_bytes
        if not groups or unit_block != block or is_full:
            groups.append([])
            block, used = unit_block, 0
        groups[-1].extend(unit)
        used += size
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if packing is Packing.ONE:
        names = [SINGLE_FILE] * len(groups)
    return [_shard(folder + name, tensors, metadata) for name, tensors in zip(names, groups, strict=True)]


def _shard(name: str, tensors: list[HeaderTensor], metadata: Mapping[str, str] | None) -> Shard:
    header, entries = build_header(tensors, file=name, metadata=metadata)
    file_bytes = max((entry.stop for entry in entries), default=len(header))
    return Shard(name, header, {entry.name: entry for entry in entries}, file_bytes)
