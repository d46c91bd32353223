"""A sharded checkpoint, laid out: every output file's header, and where each tensor's bytes go.

    DeepSeek's files              a folder for each rank
    model{i}-mp{N}.safetensors    rank-{i}/model-*.safetensors   what rank i holds
    v4quant.extra.safetensors     the same                       what the ranks do not hold, for the way back

The extra file has the header of each file of the checkpoint as `header/NAME` and each file without weights as
`file/NAME`. DeepSeek's layout loses more, which lies there too: FP8 codes and scales of wo_a, the MTP blocks' own
embedding and head, FP4 scales where the experts became FP8.

The same function lays out for `shard` and for whoever reads what it wrote, from the checkpoint's headers alone, so what
one writes the others find. What DeepSeek's files have otherwise, beside the cut: FP4 codes are called F4 and have their
logical shape, as that code's loader wants them; wo_a is BF16; the Markov tables have the names of the release.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.layout import HeaderTensor, Shard
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.checkpoint.sharding.rank_files import ExtraTensors, Run, files_of_rank
from v4quant.checkpoint.sharding.rules import OUTPUT_A, Layout, Split, split_of
from v4quant.dtypes import DTYPE_BITS
from v4quant.encodings import BF16, FP4, FP8, FP8_F32_SCALE, Encoding
from v4quant.errors import CheckpointError
from v4quant.names import TensorName, parse_name, released_spelling, scale_name

# Of tensors in all ranks together. Pro in 384 ranks of one stage, the most that its experts allow, has 1.2 million.
MAX_COPIES = 3_000_000


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


Copies = tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor goes.

    Attributes:
        source: where it lies in the checkpoint.
        split: how it is cut.
        shares: what it is cut into, in order, one share where it is whole; of each the copies that ranks hold, in rank
            order.
        kept: its bytes in the extra file; None where the shares give them back.
        recoding: where ranks hold its values in another encoding; None where they hold its bytes.
    """

    source: TensorEntry
    split: Split
    shares: tuple[Copies, ...]
    kept: TensorEntry | None = None
    recoding: Recoding | None = None

    @property
    def files(self) -> set[str]:
        """Every file that holds something of it."""
        entries = [entry for copies in self.shares for entry in copies]
        if self.recoding is not None:
            entries += [self.recoding.scale_kept, *([self.recoding.scale_part] if self.recoding.scale_part else [])]
        return {entry.file for entry in [*entries, *([self.kept] if self.kept else [])]}


@dataclass(frozen=True)
class ShardedLayout:
    """A sharded checkpoint, laid out.

    Attributes:
        run: what it was laid out for.
        ranks: the files of each rank.
        extra: the extra file.
        placements: of each source file, in the order of its data.
    """

    run: Run
    ranks: list[list[Shard]]
    extra: Shard
    placements: Mapping[str, list[Placement]]

    @property
    def grid(self) -> Grid:
        """How the ranks share the model."""
        return self.run.grid

    @property
    def files(self) -> list[Shard]:
        """Every file: those of the ranks in order, then the extra file."""
        return [*(file for files in self.ranks for file in files), self.extra]

    @cached_property
    def bytes(self) -> int:
        """Bytes of tensor data in all files."""
        return sum(entry.bytes for file in self.files for entry in file.entries.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.file_bytes for file in self.files)

    def held_by(self, rank: int) -> dict[str, TensorEntry]:
        """What a rank holds, under the names in its files."""
        return {name: entry for file in self.ranks[rank] for name, entry in file.entries.items()}


@dataclass(frozen=True, slots=True)
class _Draft:
    """A placement before offsets are known: for each share the ranks that hold it and the header tensors there."""

    source: TensorEntry
    split: Split
    shares: tuple[tuple[tuple[int, ...], tuple[HeaderTensor, ...]], ...]
    is_kept: bool = False
    after: Encoding | None = None


def lay_out_ranks(files: Sequence[SourceFile], kept_files: Mapping[str, int], run: Run) -> ShardedLayout:
    """Lay a checkpoint out for a grid that works (rules.obstacles).

    Args:
        files: its weight files.
        kept_files: name -> bytes of each file without weights.
        run: grid, layout and options.

    Raises:
        CheckpointError: if a tensor has a name that no V4 release has, or a dimension does not divide.
    """
    sources = {entry.name: entry for file in files for entry in file.entries}
    drafting = _Drafting(sources, run)
    drafts = {file.name: [drafting.draft(entry) for entry in file.entries] for file in files}
    every = [draft for of_file in drafts.values() for draft in of_file]
    copies = sum(len(holders) * len(tensors) for draft in every for holders, tensors in draft.shares)
    if copies > MAX_COPIES:
        raise CheckpointError(f"{copies:,} tensors in all ranks together, expected at most {MAX_COPIES:,}")
    extra = ExtraTensors({file.name: file.header_bytes for file in files}, kept_files)
    extra_file = extra.file([draft.source for draft in every if draft.is_kept], run)
    held = _held(every, run.grid.ranks)
    ranks = [files_of_rank(rank, held[rank], run) for rank in range(run.grid.ranks)]
    entries = [{name: entry for file in own for name, entry in file.entries.items()} for own in ranks]
    placing = _Placing(sources, entries, extra_file.entries)
    placements = {name: [placing.place(draft) for draft in of_file] for name, of_file in drafts.items()}
    return ShardedLayout(run, ranks, extra_file, placements)


def _held(drafts: Iterable[_Draft], ranks: int) -> list[list[HeaderTensor]]:
    """Header tensors of every rank."""
    held: list[list[HeaderTensor]] = [[] for _ in range(ranks)]
    for draft in drafts:
        for holders, tensors in draft.shares:
            for rank in holders:
                held[rank] += tensors
    return held


class _Drafting:
    """Decides what becomes of each tensor of a checkpoint."""

    def __init__(self, sources: Mapping[str, TensorEntry], run: Run) -> None:
        self._sources = sources
        self._run = run
        self._names = {name: _parsed(name) for name in sources}
        names = self._names.values()
        self._layers = 1 + max((name.index for name in names if name.block == "layers"), default=-1)
        self._has_mtp = any(name.block == "mtp" for name in names)
        experts, shares = 1 + max((name.expert for name in names), default=-1), run.grid.expert_shares
        if experts % shares:
            raise CheckpointError(f"{experts:,} routed experts do not divide by {shares}")
        self._experts_a_share = experts // shares

    def draft(self, entry: TensorEntry) -> _Draft:
        """Decide what becomes of one tensor."""
        name = self._names[entry.name]
        split, is_deepseek = split_of(name, self._run.layout), self._run.layout is Layout.DEEPSEEK
        called = released_spelling(name.name) if is_deepseek else entry.name
        if split is Split.LEFT_OUT:
            return _Draft(entry, split, (), is_kept=True)
        holders = self._holders(name, split)
        if split is Split.EXPERT and is_deepseek:
            return self._draft_expert(entry, name, holders[0])
        if split in (Split.WHOLE, Split.EXPERT):
            return _Draft(entry, split, ((holders[0], ((called, entry.dtype, entry.shape),)),))
        share = _share(entry, split, self._run.grid.tp)
        if is_deepseek and name.module == OUTPUT_A and entry.dtype != BF16.weight_dtype:
            if name.is_scale:
                return _Draft(entry, Split.LEFT_OUT, (), is_kept=True)
            part = ((called, BF16.weight_dtype, share),)
            return _Draft(entry, split, tuple((own, part) for own in holders), is_kept=True, after=BF16)
        part = ((called, entry.dtype, share),)
        return _Draft(entry, split, tuple((own, part) for own in holders))

    def _holders(self, name: TensorName, split: Split) -> list[tuple[int, ...]]:
        """The ranks that hold each share of a tensor."""
        grid = self._run.grid
        stages = grid.stages(name, self._layers, has_mtp=self._has_mtp)
        if split is Split.WHOLE:
            return [grid.holders(stages)]
        if split is Split.EXPERT:
            return [grid.holders(stages, expert_share=name.expert // self._experts_a_share)]
        return [grid.holders(stages, tp_rank=tp_rank) for tp_rank in range(grid.tp)]

    def _draft_expert(self, entry: TensorEntry, name: TensorName, holders: tuple[int, ...]) -> _Draft:
        """A routed expert's weight or scale in DeepSeek's layout: as stored under that code's dtype, or as FP8."""
        weight = self._sources.get(f"{entry.name.rpartition('.')[0]}.weight", entry)
        is_fp4 = weight.dtype == FP4.weight_dtype and len(weight.shape) == 2
        if is_fp4 and self._run.fp8_experts:
            if name.is_scale:
                return _Draft(entry, Split.LEFT_OUT, (), is_kept=True)
            shape = FP4.logical_shape(entry.shape)
            tensors = (
                (entry.name, FP8.weight_dtype, FP8.storage_shape(shape)),
                (scale_name(entry.name), FP8.scale_dtype, FP8.scale_shape(shape)),
            )
            return _Draft(entry, Split.EXPERT, ((holders, tensors),), after=FP8)
        if is_fp4 and not name.is_scale:
            part = (entry.name, "F4", FP4.logical_shape(entry.shape))
        else:
            part = (entry.name, entry.dtype, entry.shape)
        return _Draft(entry, Split.EXPERT, ((holders, (part,)),))


def _parsed(name: str) -> TensorName:
    parsed = parse_name(name)
    if parsed is None:
        raise CheckpointError(f"{name[:200]!r} is no tensor of a DeepSeek-V4 checkpoint")
    return parsed


def _share(entry: TensorEntry, split: Split, shares: int) -> tuple[int, ...]:
    """Header shape of one share of the rows or columns."""
    axis = 0 if split is Split.ROWS else 1
    if len(entry.shape) <= axis or entry.shape[axis] % shares or DTYPE_BITS[entry.dtype] < 8:
        raise CheckpointError(
            f"{entry.file}: {entry.name} is {entry.dtype} {list(entry.shape)}, not to be cut into {shares}"
        )
    return (*entry.shape[:axis], entry.shape[axis] // shares, *entry.shape[axis + 1 :])


@dataclass(frozen=True)
class _Placing:
    """Makes placements of drafts, now that every file has its header.

    Attributes:
        sources: tensors of the checkpoint.
        ranks: tensors of each rank.
        extra: tensors of the extra file.
    """

    sources: Mapping[str, TensorEntry]
    ranks: Sequence[Mapping[str, TensorEntry]]
    extra: Mapping[str, TensorEntry]

    def place(self, draft: _Draft) -> Placement:
        """Where a tensor goes."""
        source = draft.source
        shares = tuple(tuple(self.ranks[rank][tensors[0][0]] for rank in holders) for holders, tensors in draft.shares)
        kept = self.extra[source.name] if draft.is_kept else None
        recoding = None if draft.after is None else self._recoding(draft, draft.after)
        return Placement(source, draft.split, shares, kept, recoding)

    def _recoding(self, draft: _Draft, after: Encoding) -> Recoding:
        source = draft.source
        scale = self.sources.get(scale_name(source.name))
        if scale is None:
            raise CheckpointError(f"{source.file}: {source.name} has no block scale")
        (rank, *_), tensors = draft.shares[0]
        scale_part = self.ranks[rank][tensors[1][0]] if len(tensors) > 1 else None
        return Recoding(_before(source, scale), after, scale, self.extra[scale.name], scale_part)


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
