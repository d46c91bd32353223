"""Compare what a checkpoint stores with what its config promises, and its index with its headers, both ways.

Every difference is a Problem that names the tensor or file, what was expected and what was found.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from v4quant.checkpoint.detect import Entries, Parsed, is_dspark_stored, stored_dimensions, stored_mtp_blocks
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.index import INDEX_NAME, Index
from v4quant.config import CONFIG_NAME, V4Config
from v4quant.encodings import BF16_SCHEME, NATIVE_SCHEME, Scheme
from v4quant.inventory import LogicalTensor, logical_tensors, mtp_copies
from v4quant.names import other_spelling, scale_name

_SHOWN_NAME = 200


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a checkpoint.

    Attributes:
        where: the tensor or file.
        what: expected and found.
    """

    where: str
    what: str

    def __str__(self) -> str:
        # One line, whatever a hostile name holds; other control characters are escaped where it is printed.
        where = self.where if len(self.where) <= _SHOWN_NAME else f"{self.where[:_SHOWN_NAME]}..."
        return f"{where}: {self.what}".replace("\n", "\\n")


def audit_tensors(config: V4Config, scheme: Scheme, entries: Entries, parsed: Parsed) -> Iterator[Problem]:
    """Compare stored tensors with the inventory: missing, unexpected, wrong dtype or shape, halves of pairs."""
    left = set(entries)
    for tensor in logical_tensors(config):
        yield from _audit_tensor(tensor, scheme, entries, left)
    for tensor in mtp_copies(config, parsed.values()):
        yield from _audit_entry(entries[tensor.name], tensor.dtype, tensor.shape)
        left.discard(tensor.name)
    for name in sorted(left):
        entry = entries[name]
        yield Problem(name, f"is unexpected ({entry.dtype} {list(entry.shape)} in {entry.file})")


def _audit_tensor(tensor: LogicalTensor, scheme: Scheme, entries: Entries, left: set[str]) -> Iterator[Problem]:
    """Check one tensor of the inventory and its scale, and take them out of `left`."""
    name = stored_name(tensor, entries)
    left.discard(name)
    weight = entries.get(name)
    if tensor.kind == "plain":
        if weight is None:
            yield Problem(name, f"is missing, expected {tensor.dtype} {list(tensor.shape)}")
        else:
            yield from _audit_entry(weight, tensor.dtype, tensor.shape)
        return
    encoding = scheme.encoding(tensor.kind)
    storage_shape = encoding.storage_shape(tensor.shape)
    if weight is not None:
        yield from _audit_entry(weight, encoding.weight_dtype, storage_shape)
    beside = scale_name(name)
    scale = entries.get(beside)
    left.discard(beside)
    if encoding.block is None:
        if weight is None:
            yield Problem(name, f"is missing, expected {encoding.weight_dtype} {list(storage_shape)}")
        if scale is not None:
            yield Problem(beside, f"is a block scale, but {encoding.name} weights have none")
        return
    scale_shape = encoding.scale_shape(tensor.shape)
    if weight is None:
        without = f", though its scale {beside} is there" if scale else ""
        yield Problem(name, f"is missing, expected {encoding.weight_dtype} {list(storage_shape)}{without}")
    if scale is None:
        without = f", though its weight {name} is there" if weight else ""
        yield Problem(beside, f"is missing, expected {encoding.scale_dtype} {list(scale_shape)}{without}")
    else:
        yield from _audit_entry(scale, encoding.scale_dtype, scale_shape)


def stored_name(tensor: LogicalTensor, entries: Entries) -> str:
    """The name that a tensor of the inventory has in this checkpoint."""
    other = other_spelling(tensor.name)
    return other if other in entries and tensor.name not in entries else tensor.name


def _audit_entry(entry: TensorEntry, dtype: str, shape: tuple[int, ...]) -> Iterator[Problem]:
    if entry.dtype != dtype:
        yield Problem(entry.name, f"is stored as {entry.dtype} {list(entry.shape)}, expected {dtype} {list(shape)}")
    elif entry.shape != shape:
        yield Problem(entry.name, f"has shape {list(entry.shape)}, expected {list(shape)}")


def audit_index(index: Index, entries: Entries, files: set[str]) -> Iterator[Problem]:
    """Compare an index with the headers of all shards, both ways, and its total_size with their sum.

    Args:
        files: the safetensors files whose headers were read.
    """
    absent = Counter(file for file in index.weight_map.values() if file not in files)
    for file, count in sorted(absent.items()):
        yield Problem(INDEX_NAME, _absent_file(file, count))
    for name, file in index.weight_map.items():
        entry = entries.get(name)
        if entry is None:
            if file in files:
                yield Problem(name, f"is listed by the index in {file}, which does not hold it")
        elif entry.file != file and file in files:
            yield Problem(name, f"is listed by the index in {file}, but stored in {entry.file}")
    for name, entry in entries.items():
        if name not in index.weight_map:
            yield Problem(name, f"is stored in {entry.file}, but the index does not list it")
    stored = sum(entry.bytes for entry in entries.values())
    if index.total_size is None:
        yield Problem(INDEX_NAME, f"has no metadata.total_size, expected {stored:,}")
    elif index.total_size != stored:
        yield Problem(INDEX_NAME, f"metadata.total_size is {index.total_size:,}, but the tensors have {stored:,} bytes")


def _absent_file(file: str, count: int) -> str:
    shown = repr(file[:200])
    if "/" in file or "\\" in file or file in ("", ".", ".."):
        return f"puts {count:,} tensors into {shown}, which is no file name; nothing outside the folder is read"
    return f"puts {count:,} tensors into {shown}, which is missing or could not be read"


def audit_config(config: V4Config, scheme: Scheme, entries: Entries, parsed: Parsed) -> Iterator[Problem]:
    """Compare the config with the bytes: how weights are stored, and the dimensions that shapes tell."""
    if config.declared_scheme == BF16_SCHEME and scheme != BF16_SCHEME:
        yield _says("has no quantization_config", scheme)
    elif config.declared_scheme != BF16_SCHEME and scheme == BF16_SCHEME:
        yield _says("has a quantization_config", scheme)
    elif config.declared_scheme == NATIVE_SCHEME and scheme != NATIVE_SCHEME:
        yield _says("says expert_dtype fp4", scheme)
    elif config.expert_dtype == "fp8" and scheme == NATIVE_SCHEME:
        yield _says("says expert_dtype fp8", scheme)
    for key, (value, name) in stored_dimensions(entries, parsed).items():
        said = getattr(config, key)
        if said != value:
            claim = f"has no {key}" if said is None else f"says {key} {said:,}"
            yield Problem(CONFIG_NAME, f"{claim}, but {value:,} is stored ({name} {list(entries[name].shape)})")
    blocks = stored_mtp_blocks(parsed)
    if config.mtp_blocks != blocks:
        yield Problem(CONFIG_NAME, f"has compress_ratios for {config.mtp_blocks} MTP blocks, but {blocks} are stored")
    if blocks and config.num_nextn_predict_layers == 0:
        # Loaders go by this key. Only "some or none" is compared: the DSpark releases say 1 and have three blocks.
        stored = "1 MTP block is" if blocks == 1 else f"{blocks} MTP blocks are"
        yield Problem(
            CONFIG_NAME, f"says num_nextn_predict_layers 0, but {stored} stored; loaders would leave them out"
        )
    if config.is_dspark and blocks and not is_dspark_stored(parsed):
        yield Problem(CONFIG_NAME, "has dspark_markov_rank, but the MTP blocks that are stored are no DSpark stages")


def _says(claim: str, scheme: Scheme) -> Problem:
    stored = f"{scheme.expert.name} experts and {scheme.dense.name} elsewhere ({scheme.name})"
    return Problem(CONFIG_NAME, f"{claim}, but the tensors are stored as {stored}")


def summarise(problems: list[Problem], limit: int) -> list[tuple[str, int]]:
    """Group problems that differ only in numbers, so that a person can scan them.

    Returns:
        The first problem of each group, in order, and the size of the group; at most `limit` groups.
    """
    groups: dict[str, list[str]] = {}
    for problem in problems:
        text = str(problem)
        key = text.translate(_DIGITS)
        groups.setdefault(_squeezed(key), []).append(text)
    return [(texts[0], len(texts)) for texts in list(groups.values())[:limit]]


_DIGITS: Mapping[int, str] = {ord(digit): "#" for digit in "0123456789"}


def _squeezed(key: str) -> str:
    while "##" in key:
        key = key.replace("##", "#")
    return key
