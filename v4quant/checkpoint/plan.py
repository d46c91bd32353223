"""Decide from headers alone what a conversion does: one operation a tensor, and every byte's place in the output.

The plan reads no tensor data. It knows the exact output headers and offsets, the bytes read and written, the memory
and disk needed, and which tensors can lose bits; `apply` only carries it out.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import v4quant
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.index import build_index
from v4quant.checkpoint.layout import HeaderTensor, Packing, Shard, lay_out
from v4quant.checkpoint.reader import Checkpoint
from v4quant.checkpoint.side_files import require_side_files_fit, side_files
from v4quant.encodings import Encoding, Scheme
from v4quant.errors import UsageError
from v4quant.formats import Format
from v4quant.formats.risk import rounding_risk
from v4quant.inventory import LogicalTensor
from v4quant.names import scale_name

DEFAULT_MAX_SHARD_BYTES = 5_000_000_000
DEFAULT_WORKERS = 4
# A chunk is a band of whole 128-row blocks with about this many bytes in its larger form: big enough that system
# calls do not matter, small enough to stay in a core's cache between read, cast, hash and write.
CHUNK_BYTES = 4 * 2**20
# Resident memory of the process before any tensor is read, and of one tensor's plan entries: measured, rounded up.
BASE_MEMORY_BYTES = 260_000_000
TENSOR_MEMORY_BYTES = 2_500
# Buffers of one worker, in chunks: source, target, and the BF16 middle step of FP8 -> FP4.
CHUNK_BUFFERS = 3


@dataclass(frozen=True, slots=True)
class Operation:
    """What happens to one tensor, or to one weight and its scale.

    Attributes:
        source: the stored tensor, followed by its block scale where it has one.
        target: the same in the output; offsets are absolute in the output shard.
        source_encoding: how the weight is stored now; None for tensors that no format quantises.
        target_encoding: how it will be stored; equal to source_encoding where bytes are copied.
        like: the original's scale to prefer, under --like.
    """

    source: tuple[TensorEntry, ...]
    target: tuple[TensorEntry, ...]
    source_encoding: Encoding | None = None
    target_encoding: Encoding | None = None
    like: TensorEntry | None = None

    @property
    def name(self) -> str:
        """Name of the main tensor."""
        return self.source[0].name

    @property
    def is_copy(self) -> bool:
        """True where bytes pass through untouched."""
        return self.source_encoding == self.target_encoding

    @property
    def action(self) -> str:
        """ "copy", or the cast by the names of both encodings, for example "fp4 -> fp8"."""
        if self.source_encoding is None or self.target_encoding is None or self.is_copy:
            return "copy"
        return f"{self.source_encoding.name} -> {self.target_encoding.name}"

    @property
    def risk(self) -> str:
        """When this operation rounds; "" where it cannot."""
        if self.source_encoding is None or self.target_encoding is None:
            return ""
        return rounding_risk(self.source_encoding, self.target_encoding)

    @property
    def bytes_read(self) -> int:
        """Bytes of source data that the operation reads."""
        return sum(entry.bytes for entry in self.source)

    @property
    def bytes_written(self) -> int:
        """Bytes of tensor data that the operation writes."""
        return sum(entry.bytes for entry in self.target)


@dataclass(frozen=True)
class Plan:
    """A conversion, decided."""

    source: Checkpoint
    like: Checkpoint | None
    format: Format
    shards: list[Shard]
    operations: dict[str, list[Operation]]  # by output shard
    side_files: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Operation]:
        for shard in self.shards:
            yield from self.operations[shard.name]

    @cached_property
    def tensors(self) -> int:
        """Tensors in the output."""
        return sum(len(shard.entries) for shard in self.shards)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of source tensors."""
        return sum(operation.bytes_read for operation in self)

    @cached_property
    def bytes_written(self) -> int:
        """Bytes of output tensors: the index's total_size."""
        return sum(operation.bytes_written for operation in self)

    @cached_property
    def config_bytes(self) -> bytes:
        """config.json of the output; the source's (or the original's) own bytes where they say the same."""
        wanted = self.format.config_json(self.source.config_json)
        for candidate in (self.source, self.like):
            if candidate is not None and candidate.config_json == wanted:
                return candidate.config_bytes
        # A lone surrogate, which UTF-8 has no bytes for, becomes the escape that JSON writes it as.
        return (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")

    @property
    def folders(self) -> list[str]:
        """The local folders that are read."""
        checkpoints = [own for own in (self.source, self.like) if own is not None]
        return [own.where for own in checkpoints if not own.where.startswith("hf://")]

    def fingerprints(self) -> dict[str, str]:
        """What every file that is read looks like; those of the original, under --like, with its folder before them."""
        found = self.source.fingerprints()
        if self.like is not None:
            found |= {f"{self.like.where}/{name}": mark for name, mark in self.like.fingerprints().items()}
        return found

    @property
    def config_sha256(self) -> str:
        """Hash of the output's config.json."""
        return hashlib.sha256(self.config_bytes).hexdigest()

    @cached_property
    def index_bytes(self) -> bytes:
        """model.safetensors.index.json of the output."""
        weight_map = {name: shard.name for shard in self.shards for name in shard.entries}
        return build_index(weight_map, self.bytes_written)

    @cached_property
    def unchanged_files(self) -> dict[str, str]:
        """Output files that hold exactly the tensors of one source file, bit for bit, and which file that is.

        Only re-packing looks for them: a shared file would surprise whoever edits the result of a conversion.
        """
        if self.source.scheme != self.format.scheme:
            return {}
        held = Counter(entry.file for entry in self.source.tensors.values())
        found: dict[str, str] = {}
        for shard in self.shards:
            files = {entry.file for operation in self.operations[shard.name] for entry in operation.source}
            if len(files) == 1 and held[file := files.pop()] == len(shard.entries):
                found[shard.name] = file
        return found

    def linked_bytes(self, links: Collection[str]) -> int:
        """Bytes that these output files would take if they were no links."""
        return sum(shard.file_bytes for shard in self.shards if shard.name in links)

    @cached_property
    def disk_bytes(self) -> int:
        """Bytes of all output files, none of them a link; the certificate is counted as 400 a tensor."""
        side = sum(self.source.files.size(name) for name in self.side_files)
        shards = sum(shard.file_bytes for shard in self.shards)
        return shards + side + len(self.config_bytes) + len(self.index_bytes) + 400 * self.tensors

    def peak_memory_bytes(self, workers: int) -> int:
        """Upper estimate of resident memory: the process, the plan itself, and every worker's chunk buffers."""
        widest = max((chunk_memory_bytes(operation) for operation in self), default=CHUNK_BYTES)
        return BASE_MEMORY_BYTES + TENSOR_MEMORY_BYTES * self.tensors + workers * widest

    @cached_property
    def digest(self) -> str:
        """Identity of this plan: same source, options and version give the same digest, hence the same output."""
        parts: dict[str, Any] = {
            "version": v4quant.__version__,
            "source": self.source.source_id(),
            "like": self.like.source_id() if self.like else None,
            "config": self.config_sha256,
            "format": self.format.name,
            "shards": [[shard.name, hashlib.sha256(shard.header).hexdigest()] for shard in self.shards],
            "side_files": [[name, self.source.files.size(name)] for name in self.side_files],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def chunk_rows(shape: tuple[int, ...]) -> int:
    """Rows of a weight matrix that are converted at a time: a multiple of 128, at least one band of blocks."""
    bf16_row_bytes = 2 * shape[1]
    return max(128, CHUNK_BYTES // bf16_row_bytes // 128 * 128)


def chunk_memory_bytes(operation: Operation) -> int:
    """Bytes of one worker's buffers for this operation."""
    if operation.target_encoding is None or operation.source_encoding is None:
        return CHUNK_BYTES
    shape = operation.source_encoding.logical_shape(operation.source[0].shape)
    return CHUNK_BUFFERS * 2 * min(chunk_rows(shape), shape[0]) * shape[1]


def make_plan(
    source: Checkpoint,
    target: Format,
    *,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    packing: Packing = Packing.LAYER,
    like: Checkpoint | None = None,
) -> Plan:
    """Plan the conversion of a sound checkpoint.

    Args:
        source: the checkpoint to convert.
        target: the format to write.
        max_shard_bytes: payload limit of an output file.
        packing: which tensors share a file.
        like: an original in the target format whose block scales are reused where they reproduce the values.

    Raises:
        CheckpointError: if source or like has problems; nothing is planned on a checkpoint that contradicts itself.
        UsageError: if like is in another format or has other tensors.
    """
    source.require_sound()
    require_side_files_fit(source)
    if like is not None:
        like.require_sound()
        _require_alike(source, target, like)
    drafts = [_draft(logical, source, target.scheme) for logical in source.logical]
    shards = lay_out((draft.tensors for draft in drafts), max_shard_bytes, packing)
    place = {name: (shard.name, entry) for shard in shards for name, entry in shard.entries.items()}
    operations: dict[str, list[Operation]] = {shard.name: [] for shard in shards}
    for draft in drafts:
        shard_name = place[draft.tensors[0][0]][0]
        entries = tuple(place[tensor[0]][1] for tensor in draft.tensors)
        operations[shard_name].append(
            Operation(draft.source, entries, draft.source_encoding, draft.target_encoding, _like_scale(draft, like))
        )
    return Plan(source, like, target, shards, operations, side_files(source))


@dataclass(frozen=True, slots=True)
class _Draft:
    """An operation before its output offsets are known."""

    source: tuple[TensorEntry, ...]
    tensors: tuple[HeaderTensor, ...]
    source_encoding: Encoding | None
    target_encoding: Encoding | None


def _draft(logical: LogicalTensor, source: Checkpoint, target: Scheme) -> _Draft:
    weight = source.tensors[logical.name]
    if logical.kind == "plain":
        return _Draft((weight,), ((weight.name, weight.dtype, weight.shape),), None, None)
    before, after = source.scheme.encoding(logical.kind), target.encoding(logical.kind)
    tensors: list[HeaderTensor] = [(weight.name, after.weight_dtype, after.storage_shape(logical.shape))]
    if after.block is not None:
        tensors.append((scale_name(weight.name), after.scale_dtype, after.scale_shape(logical.shape)))
    sources = (weight,) if before.block is None else (weight, source.tensors[scale_name(weight.name)])
    return _Draft(sources, tuple(tensors), before, after)


def _like_scale(draft: _Draft, like: Checkpoint | None) -> TensorEntry | None:
    if like is None or len(draft.tensors) < 2 or draft.source_encoding == draft.target_encoding:
        return None
    return like.tensors[draft.tensors[1][0]]


def _require_alike(source: Checkpoint, target: Format, like: Checkpoint) -> None:
    if like.scheme != target.scheme:
        raise UsageError(
            f"--like {like.files.where} is stored as {like.scheme.name}, expected {target.name}, the target format",
            hint="Give the checkpoint that this one was once converted from.",
        )
    ours = {(tensor.name, tensor.shape) for tensor in source.logical}
    theirs = {(tensor.name, tensor.shape) for tensor in like.logical}
    if ours != theirs:
        name, shape = min(ours ^ theirs)
        raise UsageError(
            f"--like {like.files.where} is another model: {name} {list(shape)} is only in one of the two",
            hint="Give the checkpoint that this one was once converted from.",
        )
