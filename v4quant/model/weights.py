"""The weights of a block, read from a checkpoint of any format into the form that a run multiplies with.

d hidden size, q rank of the queries, H heads of D dims, g output groups of rank r, E experts of width m, V vocabulary.
Where ranks share the model, H and g are those that this rank has: see `ranks`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from v4quant.checkpoint.reader import Checkpoint
from v4quant.checkpoint.sharding.joined_weights import JoinedWeights
from v4quant.checkpoint.sharding.rank_copies import RankWeights
from v4quant.checkpoint.sharding.rank_tensors import RankTensors, Sharded
from v4quant.checkpoint.weights import Buffers, StoredMatrix, Weights
from v4quant.encodings import BF16
from v4quant.errors import CheckpointError
from v4quant.model.arithmetic import Activations, Arithmetic, Products
from v4quant.model.ranks import ONE_RANK, Ranks
from v4quant.names import block_prefix

Stored = Checkpoint | RankTensors | Sharded
"""What a run reads: a checkpoint, what one rank holds, or a sharded checkpoint put together as it is read."""


@dataclass(frozen=True)
class Matrix:
    """A matrix that some release quantises.

    Attributes:
        weight: bfloat16 [N, K] decoded; or codes, float8_e4m3fn [N, K] or packed FP4 uint8 [N, K/2].
        scale: of the codes; None for a decoded weight.
        rounds_input: whether activations are rounded to FP8 before it.
        packed: a weight that is decoded whenever it is used; then `weight` is empty.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None
    rounds_input: bool
    packed: StoredMatrix | None = None

    def pieces(self) -> Iterator[torch.Tensor]:
        """Rows of the decoded weight in order, bfloat16 [some, K]; each is valid until the next one is asked for."""
        return iter([self.weight]) if self.packed is None else self.packed.pieces()


@dataclass(frozen=True)
class Expert:
    """A SwiGLU expert: gate w1 and up w3 [m, d], down w2 [d, m]."""

    w1: Matrix
    w2: Matrix
    w3: Matrix


@dataclass(frozen=True)
class CompressorWeights:
    """Pooling of KV entries: ape float32 [R, C], wkv and wgate float32 [C, d], norm [C or C/2]."""

    ape: torch.Tensor
    wkv: torch.Tensor
    wgate: torch.Tensor
    norm: torch.Tensor


@dataclass(frozen=True)
class IndexerWeights:
    """Choice of compressed entries: wq_b [heads x dims, q], weights_proj bfloat16 [heads, d], keys' compressor."""

    wq_b: Matrix
    weights_proj: torch.Tensor
    compressor: CompressorWeights


@dataclass(frozen=True)
class AttentionWeights:
    """wq_a [q, d], wq_b [H D, q], wkv [D, d], wo_a bfloat16 [g, r, H D / g], wo_b [d, g r], norms, sink float32 [H]."""

    wq_a: Matrix
    q_norm: torch.Tensor
    wq_b: Matrix
    wkv: Matrix
    kv_norm: torch.Tensor
    sink: torch.Tensor
    wo_a: torch.Tensor
    wo_b: Matrix
    compressor: CompressorWeights | None
    indexer: IndexerWeights | None


@dataclass(frozen=True)
class HyperWeights:
    """A hyper-connection: fn float32 [rows, streams x d], base [rows], scale [3], or [1] before the head."""

    fn: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class RouterWeights:
    """gate float32 [E, d]; bias float32 [E] or, in hash layers, table int64 [V, k]."""

    gate: torch.Tensor
    bias: torch.Tensor | None
    table: torch.Tensor | None


@dataclass(frozen=True)
class BlockWeights:
    """A layer or an MTP block without its routed experts."""

    attention_mix: HyperWeights
    attention_norm: torch.Tensor
    attention: AttentionWeights
    ffn_mix: HyperWeights
    ffn_norm: torch.Tensor
    router: RouterWeights
    shared_expert: Expert


def _weights_of(source: Stored) -> Weights | JoinedWeights:
    if isinstance(source, Sharded):
        return JoinedWeights(source)
    return RankWeights(source) if isinstance(source, RankTensors) else Weights(source)


class Reader:
    """Reads the weights of blocks, from any thread.

    Attributes:
        weights: the checkpoint's tensors.
        config: of the checkpoint.
        arithmetic: of the run.
        ranks: this rank, and those that it computes with.
        experts: routed experts of a block that this rank holds.
        vocabulary: rows of the embedding and of the head that it holds.
    """

    def __init__(
        self, source: Stored, arithmetic: Arithmetic, device: torch.device | str = "cpu", ranks: Ranks = ONE_RANK
    ) -> None:
        """Read for runs with this arithmetic on this device.

        Raises:
            CheckpointError: if the checkpoint has problems.
        """
        self.weights = _weights_of(source)
        self.config = source.config
        self.arithmetic = arithmetic
        self.device = torch.device(device)
        self.ranks = ranks
        place, rows = ranks.place, self.config.vocab_size // ranks.place.grid.tp
        self.experts = place.experts(self.config.n_routed_experts)
        self.vocabulary = range(place.tp_rank * rows, (place.tp_rank + 1) * rows)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in its stored dtype, on the run's device."""
        return self.weights.tensor(name).to(self.device)

    def matrix(self, module: str, buffers: Buffers | None = None) -> Matrix:
        """A matrix that some release quantises, in the form of the run.

        Args:
            module: its name without ".weight".
            buffers: for a decoded matrix, which lives in them until their next use.
        """
        is_bf16 = self.weights.encoding(module) == BF16
        rounds = self._rounds_input(is_bf16)
        if self.arithmetic.products is Products.CODED and not is_bf16 and rounds:
            codes, scale = self.weights.codes(module)
            return Matrix(codes.to(self.device), scale.to(self.device), rounds)
        return Matrix(self.weights.matrix(module, buffers).to(self.device), None, rounds)

    def packed(self, module: str, buffers: Buffers) -> Matrix:
        """The same matrix for a single use on a CPU: read now, decoded piece by piece as it is multiplied with.

        Args:
            module: its name without ".weight".
            buffers: that hold it until their next use.
        """
        is_bf16 = self.weights.encoding(module) == BF16
        if is_bf16 or self.device.type != "cpu":
            return self.matrix(module, buffers)
        return Matrix(torch.empty(0), None, self._rounds_input(is_bf16), self.weights.stored(module, buffers))

    def expert(self, prefix: str) -> Expert:
        """The three matrices of an expert; prefix as "layers.3.ffn.shared_experts."."""
        return Expert(*(self.matrix(f"{prefix}{name}") for name in ("w1", "w2", "w3")))

    def packed_expert(self, prefix: str, buffers: tuple[Buffers, Buffers, Buffers]) -> Expert:
        """The same for a single use; see `packed`."""
        pairs = zip(("w1", "w2", "w3"), buffers, strict=True)
        return Expert(*(self.packed(f"{prefix}{name}", own) for name, own in pairs))

    def _rounds_input(self, is_bf16: bool) -> bool:
        activations = self.arithmetic.activations
        return activations is Activations.RELEASE or (activations is Activations.STORED and not is_bf16)

    def hyper(self, name: str) -> HyperWeights:
        """A hyper-connection; name as "layers.3.hc_attn" or "hc_head"."""
        return HyperWeights(*(self.tensor(f"{name}_{part}") for part in ("fn", "base", "scale")))

    def block(self, kind: str, index: int) -> BlockWeights:
        """Everything of a block but its routed experts.

        Args:
            kind: "layers" or "mtp".
            index: number of the block.

        Raises:
            CheckpointError: if a tensor is missing or damaged.
        """
        prefix = block_prefix(kind, index)
        return BlockWeights(
            attention_mix=self.hyper(f"{prefix}hc_attn"),
            attention_norm=self.tensor(f"{prefix}attn_norm.weight"),
            attention=self._attention(f"{prefix}attn.", self.ratio(kind, index)),
            ffn_mix=self.hyper(f"{prefix}hc_ffn"),
            ffn_norm=self.tensor(f"{prefix}ffn_norm.weight"),
            router=self._router(f"{prefix}ffn.gate."),
            shared_expert=self.expert(f"{prefix}ffn.shared_experts."),
        )

    def ratio(self, kind: str, index: int) -> int:
        """Compression of a block: 0, 4 or 128."""
        return self.config.compress_ratios[index + (self.config.num_hidden_layers if kind == "mtp" else 0)]

    def _attention(self, prefix: str, ratio: int) -> AttentionWeights:
        wo_a = self.weights.matrix(f"{prefix}wo_a").to(self.device)  # [g r, H D / g]
        return AttentionWeights(
            wq_a=self.matrix(f"{prefix}wq_a"),
            q_norm=self.tensor(f"{prefix}q_norm.weight"),
            wq_b=self.matrix(f"{prefix}wq_b"),
            wkv=self.matrix(f"{prefix}wkv"),
            kv_norm=self.tensor(f"{prefix}kv_norm.weight"),
            sink=self.tensor(f"{prefix}attn_sink"),
            wo_a=wo_a.view(-1, self.config.o_lora_rank, wo_a.shape[1]),  # [g, r, H D / g]
            wo_b=self.matrix(f"{prefix}wo_b"),
            compressor=self._compressor(f"{prefix}compressor.") if ratio else None,
            indexer=self._indexer(f"{prefix}indexer.") if ratio == 4 else None,
        )

    def _compressor(self, prefix: str) -> CompressorWeights:
        return CompressorWeights(
            ape=self.tensor(f"{prefix}ape"),
            wkv=self.tensor(f"{prefix}wkv.weight").float(),
            wgate=self.tensor(f"{prefix}wgate.weight").float(),
            norm=self.tensor(f"{prefix}norm.weight"),
        )

    def _indexer(self, prefix: str) -> IndexerWeights:
        return IndexerWeights(
            wq_b=self.matrix(f"{prefix}wq_b"),
            weights_proj=self.tensor(f"{prefix}weights_proj.weight"),
            compressor=self._compressor(f"{prefix}compressor."),
        )

    def _router(self, prefix: str) -> RouterWeights:
        gate = self.tensor(f"{prefix}weight").float()
        name = f"{prefix}tid2eid"
        if not self.weights.has(name):
            return RouterWeights(gate, self.tensor(f"{prefix}bias"), None)
        table = self.tensor(name)
        experts = self.config.n_routed_experts
        if not 0 <= int(table.min()) <= int(table.max()) < experts:
            raise CheckpointError(
                f"{name}: holds experts {int(table.min())} to {int(table.max())}, expected 0 to {experts - 1}",
                hint="The weights are damaged; download or export them again.",
            )
        return RouterWeights(gate, None, table)
