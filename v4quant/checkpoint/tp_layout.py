"""The tensor-parallel layout of a checkpoint: every output file's header, and where each tensor's bytes go.

    model{i}-mp{N}.safetensors    rank i of N, as DeepSeek's inference code loads it
    v4quant.tp-extra.safetensors  what the ranks do not hold, for the way back: FP8 codes and scales of wo_a, the MTP
                                  blocks' own embedding and head, FP4 scales where the experts became FP8, the header
                                  of each source file as `header/NAME`, and each file without weights as `file/NAME`

The same function lays out for `shard` and for `merge`, from source headers alone, so what one writes the other finds.
Differences from the source, beside the cut: FP4 codes are called F4 and have their logical shape, as that code's
loader wants them; wo_a is BF16; the Markov tables have the names of the release.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from v4quant.checkpoint.header import TensorEntry, build_header
from v4quant.checkpoint.layout import HeaderTensor, Shard
from v4quant.checkpoint.tp_rules import OUTPUT_A, Split, split_of
from v4quant.encodings import BF16, FP4, FP8, FP8_F32_SCALE, Encoding
from v4quant.errors import CheckpointError
from v4quant.names import TensorName, parse_name, released_spelling, scale_name

EXTRA_NAME = "v4quant.tp-extra.safetensors"
HEADER_PREFIX = "header/"
FILE_PREFIX = "file/"
RUN_KEY, RANK_KEY, RANKS_KEY = "v4quant.run", "v4quant.rank", "v4quant.ranks"


@dataclass(frozen=True)
class SourceFile:
    """A weight file of the checkpoint.

    Attributes:
        name: its name.
        header_bytes: bytes before its data.
        entries: its tensors in the order of their data.
    """

    name: str
    header_bytes: int
    entries: Sequence[TensorEntry]

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return max((entry.stop for entry in self.entries), default=self.header_bytes)


@dataclass(frozen=True, slots=True)
class Recoding:
    """A weight that ranks hold in another encoding.

    Attributes:
        before, after: how it is stored in the checkpoint and in the ranks.
        scale: its block scale in the checkpoint.
        scale_kept: the same in the extra file.
        scale_part: the new block scale in the rank; None where there is none.
    """

    before: Encoding
    after: Encoding
    scale: TensorEntry
    scale_kept: TensorEntry
    scale_part: TensorEntry | None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor goes.

    Attributes:
        source: where it lies in the checkpoint.
        split: how the ranks share it.
        parts: what the ranks hold of it, in rank order.
        kept: its bytes in the extra file; None where the ranks' parts give them back.
        recoding: where ranks hold its values in another encoding; None where they hold its bytes.
    """

    source: TensorEntry
    split: Split
    parts: tuple[TensorEntry, ...]
    kept: TensorEntry | None = None
    recoding: Recoding | None = None


@dataclass(frozen=True)
class TpLayout:
    """A sharded checkpoint, laid out.

    Attributes:
        ranks: how many.
        files: the rank files in order, then the extra file.
        placements: of each source file, in the order of its data.
    """

    ranks: int
    files: list[Shard]
    placements: Mapping[str, list[Placement]]

    @property
    def extra(self) -> Shard:
        """The extra file."""
        return self.files[-1]

    @cached_property
    def bytes(self) -> int:
        """Bytes of tensor data in all files."""
        return sum(entry.bytes for file in self.files for entry in file.entries.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.file_bytes for file in self.files)


def rank_file(rank: int, ranks: int) -> str:
    """Name of a rank's file."""
    return f"model{rank}-mp{ranks}.safetensors"


@dataclass(frozen=True, slots=True)
class _Draft:
    """A placement before offsets are known: for each rank that holds a part its number and the header tensors there."""

    source: TensorEntry
    split: Split
    parts: tuple[tuple[int, tuple[HeaderTensor, ...]], ...]
    is_kept: bool
    after: Encoding | None = None


def lay_out_ranks(
    files: Sequence[SourceFile], kept_files: Mapping[str, int], ranks: int, *, fp8_experts: bool, run: str
) -> TpLayout:
    """Lay a checkpoint out for a number of ranks that works (tp_rules.obstacles).

    Args:
        files: its weight files.
        kept_files: name -> bytes of each file without weights.
        ranks: N.
        fp8_experts: cast FP4 experts to FP8.
        run: what tells these files from those of another source or of other options.

    Raises:
        CheckpointError: if a tensor has a name that no V4 release has, or a dimension does not divide.
    """
    sources = {entry.name: entry for file in files for entry in file.entries}
    names = {name: _parsed(name) for name in sources}
    experts = 1 + max((name.expert for name in names.values()), default=-1)
    if experts % ranks:
        raise CheckpointError(f"{experts:,} routed experts do not divide by {ranks}")
    drafts = {
        file.name: [
            _draft(entry, names[entry.name], sources, ranks, experts // ranks, fp8_experts=fp8_experts)
            for entry in file.entries
        ]
        for file in files
    }
    shards = _shards(files, kept_files, [draft for of_file in drafts.values() for draft in of_file], ranks, run)
    return TpLayout(
        ranks,
        shards,
        {name: [_placement(draft, sources, shards) for draft in of_file] for name, of_file in drafts.items()},
    )


def _parsed(name: str) -> TensorName:
    parsed = parse_name(name)
    if parsed is None:
        raise CheckpointError(f"{name[:200]!r} is no tensor of a DeepSeek-V4 checkpoint")
    return parsed


def _draft(
    entry: TensorEntry,
    name: TensorName,
    sources: Mapping[str, TensorEntry],
    ranks: int,
    experts_a_rank: int,
    *,
    fp8_experts: bool,
) -> _Draft:
    """Decide what becomes of one tensor."""
    split, everyone, called = split_of(name), range(ranks), released_spelling(name.name)
    if split is Split.LEFT_OUT:
        return _Draft(entry, split, (), is_kept=True)
    if split is Split.EXPERT:
        return _draft_expert(entry, name, sources, name.expert // experts_a_rank, fp8_experts=fp8_experts)
    if split is Split.WHOLE:
        whole = ((called, entry.dtype, entry.shape),)
        return _Draft(entry, split, tuple((rank, whole) for rank in everyone), is_kept=False)
    share = _share(entry, split, ranks)
    if name.module == OUTPUT_A and entry.dtype != BF16.weight_dtype:
        if name.is_scale:
            return _Draft(entry, Split.LEFT_OUT, (), is_kept=True)
        part = ((called, BF16.weight_dtype, share),)
        return _Draft(entry, split, tuple((rank, part) for rank in everyone), is_kept=True, after=BF16)
    part = ((called, entry.dtype, share),)
    return _Draft(entry, split, tuple((rank, part) for rank in everyone), is_kept=False)


def _draft_expert(
    entry: TensorEntry, name: TensorName, sources: Mapping[str, TensorEntry], rank: int, *, fp8_experts: bool
) -> _Draft:
    """A routed expert's weight or scale: of one rank, as stored or as FP8."""
    weight = sources.get(f"{entry.name.rpartition('.')[0]}.weight", entry)
    is_fp4 = weight.dtype == FP4.weight_dtype and len(weight.shape) == 2
    if is_fp4 and fp8_experts:
        if name.is_scale:
            return _Draft(entry, Split.LEFT_OUT, (), is_kept=True)
        shape = FP4.logical_shape(entry.shape)
        tensors = (
            (entry.name, FP8.weight_dtype, FP8.storage_shape(shape)),
            (scale_name(entry.name), FP8.scale_dtype, FP8.scale_shape(shape)),
        )
        return _Draft(entry, Split.EXPERT, ((rank, tensors),), is_kept=False, after=FP8)
    if is_fp4 and not name.is_scale:
        part = (entry.name, "F4", FP4.logical_shape(entry.shape))
    else:
        part = (entry.name, entry.dtype, entry.shape)
    return _Draft(entry, Split.EXPERT, ((rank, (part,)),), is_kept=False)


def _share(entry: TensorEntry, split: Split, ranks: int) -> tuple[int, ...]:
    """Header shape of a rank's share of the rows or columns."""
    axis = 0 if split is Split.ROWS else 1
    if len(entry.shape) <= axis or entry.shape[axis] % ranks:
        raise CheckpointError(f"{entry.file}: {entry.name} has shape {list(entry.shape)}, not to be cut into {ranks}")
    return (*entry.shape[:axis], entry.shape[axis] // ranks, *entry.shape[axis + 1 :])


def _shards(
    files: Sequence[SourceFile], kept_files: Mapping[str, int], drafts: Iterable[_Draft], ranks: int, run: str
) -> list[Shard]:
    """The output files, with headers built."""
    of_rank: dict[int, list[HeaderTensor]] = defaultdict(list)
    extra: list[HeaderTensor] = [(HEADER_PREFIX + file.name, "U8", (file.header_bytes,)) for file in files]
    extra += [(FILE_PREFIX + name, "U8", (size,)) for name, size in kept_files.items()]
    for draft in drafts:
        for rank, tensors in draft.parts:
            of_rank[rank] += tensors
        if draft.is_kept:
            extra.append((draft.source.name, draft.source.dtype, draft.source.shape))
    shards = [
        _shard(rank_file(rank, ranks), of_rank[rank], {RUN_KEY: run, RANK_KEY: str(rank), RANKS_KEY: str(ranks)})
        for rank in range(ranks)
    ]
    return [*shards, _shard(EXTRA_NAME, extra, {RUN_KEY: run, RANKS_KEY: str(ranks)})]


def _shard(name: str, tensors: Iterable[HeaderTensor], metadata: Mapping[str, str]) -> Shard:
    header, entries = build_header(tensors, file=name, metadata=metadata)
    return Shard(
        name,
        header,
        {entry.name: entry for entry in entries},
        max((entry.stop for entry in entries), default=len(header)),
    )


def _placement(draft: _Draft, sources: Mapping[str, TensorEntry], shards: Sequence[Shard]) -> Placement:
    """Look up where the header builder has put everything."""
    extra, source = shards[-1].entries, draft.source
    parts = tuple(shards[rank].entries[tensors[0][0]] for rank, tensors in draft.parts)
    recoding = None
    if draft.after is not None:
        scale = sources.get(scale_name(source.name))
        if scale is None:
            raise CheckpointError(f"{source.file}: {source.name} has no block scale")
        rank, tensors = draft.parts[0]
        scale_part = shards[rank].entries[tensors[1][0]] if len(tensors) > 1 else None
        recoding = Recoding(_before(source, scale), draft.after, scale, extra[scale.name], scale_part)
    return Placement(source, draft.split, parts, extra[source.name] if draft.is_kept else None, recoding)


def _before(weight: TensorEntry, scale: TensorEntry) -> Encoding:
    """How a weight that is recoded is stored."""
    for encoding in (FP4, FP8, FP8_F32_SCALE):
        if (
            (weight.dtype, scale.dtype) == (encoding.weight_dtype, encoding.scale_dtype)
            and len(weight.shape) == 2
            and scale.shape == encoding.scale_shape(encoding.logical_shape(weight.shape))
        ):
            return encoding
    raise CheckpointError(
        f"{weight.file}: {weight.name} is {weight.dtype} {list(weight.shape)} with scale {scale.dtype} "
        f"{list(scale.shape)}, expected FP4 or FP8 with its block scale"
    )
