"""The same model with nothing rounded: everything in FP32, KV entries and the indexer's keys and queries included.

For comparison with other implementations that round elsewhere or nowhere; never what a checkpoint is judged by.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from v4quant.config import V4Config
from v4quant.kernels.compress_kv import CompressorState, pool_windows
from v4quant.kernels.sparse_attention import Picked
from v4quant.model.operations import multiply_each
from v4quant.model.ranks import ALONE, Group
from v4quant.model.weights import CompressorWeights, HyperWeights, Matrix

# Queries at a time in attention.
_PIECE = 64


@dataclass(frozen=True)
class FloatEntries:
    """Entries as plain FP32 rows: pages [P, entries, D]."""

    entries: int
    dim: int
    eps: float

    def empty_pages(self, count: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(count, self.entries, self.dim, device=device)

    def write(
        self, x: torch.Tensor, norm: torch.Tensor, cos_sin: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor
    ) -> None:
        y = _rotate_(_rms_norm(x, self.eps) * norm.float(), cos_sin)
        pages.view(-1, self.dim)[slots.long()] = y

    def read(self, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return pages.view(-1, self.dim)[slots.long()]

    def picked(self, pages: torch.Tensor, slots: torch.Tensor) -> Picked:
        return Picked(pages.view(-1, self.dim), slots)


class Float32:
    """Operations without rounding; shapes and meanings as in `operations.Operations`."""

    dtype = torch.float32

    def __init__(self, config: V4Config) -> None:
        self._config = config

    def prepare(self, x: torch.Tensor, _matrix: Matrix) -> torch.Tensor:
        return x

    def multiply(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        return multiply_each([self], [x], matrix)[0]

    def linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        return self.multiply(x, matrix)

    def partial(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        return self.multiply(x, matrix)

    def plain_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight.float())

    def wide_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weight)

    def grouped_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tgk,gnk->tgn", x, weight.float())

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
        return functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _rms_norm(x, self._config.rms_norm_eps) * weight.float()

    def query_norm_(self, q: torch.Tensor, heads: Group = ALONE) -> torch.Tensor:
        del heads
        return q.copy_(_rms_norm(q, self._config.rms_norm_eps))

    def rope_(self, x: torch.Tensor, cos_sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        return _rotate_(x, cos_sin[:, None], inverse)

    def kv_codec(self, entries: int) -> FloatEntries:
        return FloatEntries(entries, self._config.head_dim, self._config.rms_norm_eps)

    def key_codec(self, entries: int) -> FloatEntries:
        return FloatEntries(entries, self._config.index_head_dim, self._config.rms_norm_eps)

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
        return pool_windows(kv, score, weights.ape, state, sequences, positions, ends)

    def index_queries(self, q: torch.Tensor) -> torch.Tensor:
        return q

    def pick(
        self, q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor, k: int
    ) -> torch.Tensor:
        scores = (torch.einsum("thd,ed->the", q, keys).relu() * weights[..., None]).sum(1)  # [T, E]
        hidden = torch.arange(len(keys), device=q.device) >= visible[:, None]
        best = scores.masked_fill(hidden, -torch.inf).topk(min(k, len(keys)))
        found = best.indices.masked_fill(best.values == -torch.inf, -1).to(torch.int32)
        return functional.pad(found, (0, k - found.shape[1]), value=-1)

    def attend(self, q: torch.Tensor, sink: torch.Tensor, picked: Sequence[Picked]) -> torch.Tensor:
        out = torch.empty_like(q)
        for first in range(0, len(q), _PIECE):
            rows = slice(first, first + _PIECE)
            found = [keys.indices[rows] for keys in picked]
            keys = torch.cat([keys.entries[keys.indices[rows].clamp(min=0).long()] for keys in picked], 1)  # [t, L, D]
            scores = torch.einsum("thd,tld->thl", q[rows], keys) * q.shape[2] ** -0.5
            scores = scores.masked_fill(torch.cat(found, 1)[:, None] < 0, -torch.inf)
            sinks = sink[None, :, None].expand(len(scores), -1, 1)
            share = torch.cat([scores, sinks], 2).softmax(2)[..., :-1]
            out[rows] = torch.einsum("thl,tld->thd", share, keys)
        return out

    def mix(self, x: torch.Tensor, weights: HyperWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        eps, count = self._config.hc_eps, x.shape[1]
        sizes = [count, count, count * count]
        pre, post, comb = torch.split(self._mixes(x, weights), sizes, 1)
        bases = torch.split(weights.base, sizes)
        pre = torch.sigmoid(pre * weights.scale[0] + bases[0]) + eps
        post = 2 * torch.sigmoid(post * weights.scale[1] + bases[1])
        comb = (comb * weights.scale[2] + bases[2]).view(-1, count, count).softmax(2) + eps
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        for _ in range(self._config.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(2, keepdim=True) + eps)
            comb = comb / (comb.sum(1, keepdim=True) + eps)
        return torch.einsum("ts,tsd->td", pre, x), post, comb

    def combine(self, f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
        return post[..., None] * f[:, None] + torch.einsum("tij,tid->tjd", comb, x)

    def collapse(self, x: torch.Tensor, weights: HyperWeights) -> torch.Tensor:
        pre = torch.sigmoid(self._mixes(x, weights) * weights.scale + weights.base) + self._config.hc_eps
        return torch.einsum("ts,tsd->td", pre, x)

    def _mixes(self, x: torch.Tensor, weights: HyperWeights) -> torch.Tensor:
        flat = x.flatten(1)  # [T, S d]
        return functional.linear(flat, weights.fn) * torch.rsqrt(
            flat.square().mean(1, keepdim=True) + self._config.rms_norm_eps
        )


def _rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rotate_(x: torch.Tensor, cos_sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    rotated = x[..., -cos_sin.shape[-1] :]
    even, odd = rotated[..., 0::2].clone(), rotated[..., 1::2].clone()
    cos, sin = cos_sin.chunk(2, -1)
    sin = -sin if inverse else sin
    rotated[..., 0::2] = even * cos - odd * sin
    rotated[..., 1::2] = even * sin + odd * cos
    return x
