"""The arithmetic of DeepSeek's released inference code, on the project's kernels: BF16 activations, FP8 before every
quantised matrix, FP8 KV entries, Hadamard and FP4 in the indexer, FP32 in router, compressor and hyper-connections."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from v4quant.config import V4Config
from v4quant.kernels.act_quant_fp4 import act_round_fp4
from v4quant.kernels.act_quant_fp8 import act_quant_fp8, act_round_fp8
from v4quant.kernels.compress_kv import CompressorState, compress_kv
from v4quant.kernels.dequantize import dequantize_fp8
from v4quant.kernels.fp8_gemm import fp8_gemm
from v4quant.kernels.hadamard import hadamard
from v4quant.kernels.hyper_mix import hyper_collapse, hyper_combine, hyper_mix
from v4quant.kernels.indexer_key_cache import indexer_key_read_fp4, indexer_key_write_fp4
from v4quant.kernels.indexer_scores import indexer_scores
from v4quant.kernels.kv_cache import kv_read_fp8, kv_write_fp8
from v4quant.kernels.kv_layout import PageLayout, key_layout, kv_layout
from v4quant.kernels.query_norm import query_norm_
from v4quant.kernels.rms_norm import rms_norm
from v4quant.kernels.rope import rope_
from v4quant.kernels.sparse_attention import Picked, sparse_attention
from v4quant.kernels.top_k import top_k
from v4quant.model.operations import multiply_each
from v4quant.model.ranks import ALONE, Group
from v4quant.model.weights import CompressorWeights, HyperWeights, Matrix

ACTIVATION_BLOCK = 128
# Values of a weight that are made FP32 at a time.
_WIDE_VALUES = 2**22


@dataclass(frozen=True)
class _Pages:
    """Pages of one layout, for entries `dim` wide that were normalised with `eps`."""

    layout: PageLayout
    dim: int
    eps: float

    @property
    def entries(self) -> int:
        return self.layout.entries

    def empty_pages(self, count: int, device: torch.device) -> torch.Tensor:
        return self.layout.empty_pages(count * self.layout.entries, device)

    def picked(self, pages: torch.Tensor, slots: torch.Tensor) -> Picked:
        return Picked(pages, slots, self.layout)


class Fp8Entries(_Pages):
    """KV entries of 584 bytes: E4M3 with a scale for each 64 dims, RoPE dims in BF16."""

    def write(
        self, x: torch.Tensor, norm: torch.Tensor, cos_sin: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor
    ) -> None:
        kv_write_fp8(x, norm, self.eps, cos_sin, pages, slots, self.layout)

    def read(self, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return kv_read_fp8(pages, slots, self.layout, self.dim)


class Fp4Keys(_Pages):
    """Indexer keys of 68 bytes: E2M1 with a scale for each 32 dims; they are scored, not attended to."""

    def write(
        self, x: torch.Tensor, norm: torch.Tensor, cos_sin: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor
    ) -> None:
        indexer_key_write_fp4(x, norm, self.eps, cos_sin, pages, slots, self.layout)

    def read(self, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return indexer_key_read_fp4(pages, slots, self.layout, self.dim)


class Release:
    """Operations of the release; shapes and meanings as in `operations.Operations`."""

    dtype = torch.bfloat16

    def __init__(self, config: V4Config) -> None:
        self._config = config

    def prepare(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        return act_round_fp8(x, ACTIVATION_BLOCK) if matrix.rounds_input else x

    def multiply(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        if matrix.scale is None:
            return multiply_each([self], [x], matrix)[0]
        # Quantising what prepare has rounded gives the same values: they are E4M3 times a power of two already.
        return fp8_gemm(*act_quant_fp8(x, ACTIVATION_BLOCK), matrix.weight, matrix.scale)

    def linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        return self.multiply(x if matrix.scale is not None else self.prepare(x, matrix), matrix)

    def partial(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        # Coded products come out in BF16, and rounded shares would be farther from the whole than any order of sums.
        weight = matrix.weight if matrix.scale is None else dequantize_fp8(matrix.weight, matrix.scale)
        return self._wide_product(self.prepare(x, matrix).float(), weight)

    def _wide_product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """float32 [T, K] times a decoded weight [N, K]: float32 [T, N]."""
        rows = max(1, _WIDE_VALUES // weight.shape[1])
        return torch.cat([functional.linear(x, piece.float()) for piece in torch.split(weight, rows)], 1)

    def plain_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight)

    def wide_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight)

    def grouped_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tgk,gnk->tgn", x, weight)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
        return functional.silu(gate.float().clamp_(max=limit)).mul_(up.float().clamp_(-limit, limit))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, self._config.rms_norm_eps)

    def query_norm_(self, q: torch.Tensor, heads: Group = ALONE) -> torch.Tensor:
        own = slice(heads.rank * q.shape[1], (heads.rank + 1) * q.shape[1])
        of_all = (lambda mean: (heads.join(mean, 1), own)) if heads.size > 1 else None
        return query_norm_(q, self._config.rms_norm_eps, of_all)

    def rope_(self, x: torch.Tensor, cos_sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        return rope_(x, cos_sin, inverse)

    def kv_codec(self, entries: int) -> Fp8Entries:
        dim = self._config.head_dim
        return Fp8Entries(kv_layout(entries, dim), dim, self._config.rms_norm_eps)

    def key_codec(self, entries: int) -> Fp4Keys:
        dim = self._config.index_head_dim
        return Fp4Keys(key_layout(entries, dim), dim, self._config.rms_norm_eps)

    def compress(
        self,
        kv: torch.Tensor,
        score: torch.Tensor,
        weights: CompressorWeights,
        state: CompressorState,
        sequences: torch.Tensor,
        positions: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        return compress_kv(kv, score, weights.ape, state, sequences, positions, ends)

    def index_queries(self, q: torch.Tensor) -> torch.Tensor:
        rows = q.view(-1, q.shape[2])  # [T H, D]
        return act_round_fp4(hadamard(rows)).view_as(q)

    def pick(
        self, q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor, k: int
    ) -> torch.Tensor:
        return top_k(indexer_scores(q, keys, weights, visible), visible, k)

    def attend(self, q: torch.Tensor, sink: torch.Tensor, picked: Sequence[Picked]) -> torch.Tensor:
        return sparse_attention(q, sink, *picked)

    def mix(self, x: torch.Tensor, weights: HyperWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self._config
        return hyper_mix(
            x,
            weights.fn,
            weights.scale,
            weights.base,
            norm_eps=config.rms_norm_eps,
            eps=config.hc_eps,
            iterations=config.hc_sinkhorn_iters,
        )

    def combine(self, f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
        return hyper_combine(f, x, post, comb)

    def collapse(self, x: torch.Tensor, weights: HyperWeights) -> torch.Tensor:
        config = self._config
        eps = {"norm_eps": config.rms_norm_eps, "eps": config.hc_eps}
        return hyper_collapse(x, weights.fn, weights.scale, weights.base, **eps)
