"""Attention of every query over the entries that it picked: the window's and the compressed ones, K = V.

    s_j = q . k_j x D^-1/2                                float32, j over the picked entries
    out = sum_j exp(s_j - m) k_j / (sum_j exp(s_j - m) + exp(sink - m)),   m = max_j s_j

The sink is a learned number a head that joins the denominator only. Keys come in blocks of 64 with an online softmax:
the sum is taken of float32 exp(s - m), then it is rounded to BF16 for the product with k, m being the largest score up
to that block. A row without any entry gives zeros. Source: `sparse_attn_kernel` of DeepSeek's released inference code.

T queries, H heads, D the head dimension (512), E entries in a pool, L indices a query.
"""

from dataclasses import dataclass

import torch

from v4quant.kernels._backend import require, use_triton
from v4quant.kernels.kv_cache import kv_read_fp8_torch
from v4quant.kernels.kv_layout import PageLayout

BLOCK_KEYS = 64
# Gathered keys of a chunk of queries, float32: stays within the caches of a CPU core.
CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Picked:
    """Entries that queries may look at, and which of them each query looks at.

    Attributes:
        entries: bfloat16 [E, D]; or uint8 pages of kv_cache, then the indices are slots.
        indices: int32 [T, L], each below E, or -1 for none.
        layout: of the pages; None for bfloat16 entries.
    """

    entries: torch.Tensor
    indices: torch.Tensor
    layout: PageLayout | None = None

    def gather(self, rows: slice, dim: int) -> torch.Tensor:
        """The entries that some queries look at, zeros for none: float32 [T, L, D]."""
        indices = self.indices[rows]  # [T, L]
        if self.layout is not None:
            entries = kv_read_fp8_torch(self.entries, indices.flatten(), self.layout, dim)
        elif len(self.entries):
            entries = self.entries.index_select(0, indices.clamp(min=0).flatten())  # [T L, D]
            entries[(indices < 0).flatten()] = 0
        else:
            entries = self.entries.new_zeros(indices.numel(), dim)
        return entries.float().view(*indices.shape, dim)


def sparse_attention_torch(q: torch.Tensor, sink: torch.Tensor, *picked: Picked) -> torch.Tensor:
    """Reference for sparse_attention: same arguments, any device; a chunk of queries at a time."""
    queries, _, dim = q.shape
    longest = max(max(keys.indices.shape[1] for keys in picked), 1)
    chunk = max(1, CHUNK_BYTES // (4 * longest * dim))
    out = torch.empty_like(q)
    for start in range(0, queries, chunk):
        rows = slice(start, min(start + chunk, queries))
        out[rows] = _attend(q[rows].float(), sink, [(keys.gather(rows, dim), keys.indices[rows]) for keys in picked])
    return out


def _attend(q: torch.Tensor, sink: torch.Tensor, picked: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Attention of q, float32 [T, H, D], over lists of keys [T, L, D] with their indices [T, L]."""
    queries, heads, dim = q.shape
    best = q.new_full((queries, heads, 1), -torch.inf)
    total = q.new_zeros(queries, heads, 1)
    out = q.new_zeros(queries, heads, dim)
    for keys, indices in picked:
        scores = torch.bmm(q, keys.mT) * dim**-0.5  # [T, H, L]
        scores.masked_fill_(indices[:, None] < 0, -torch.inf)
        for block, part in zip(torch.split(scores, BLOCK_KEYS, 2), torch.split(keys, BLOCK_KEYS, 1), strict=True):
            if not block.shape[2]:
                continue
            larger = torch.maximum(best, block.amax(2, keepdim=True))  # [T, H, 1]
            shift = larger.masked_fill(larger == -torch.inf, 0.0)  # nothing picked yet: keep exp(-inf) = 0
            weight = torch.exp(block - shift)  # [T, H, 64]
            decay = torch.exp(best - shift)
            total = total * decay + weight.sum(2, keepdim=True)
            out.mul_(decay).baddbmm_(weight.to(torch.bfloat16).float(), part)
            best = larger
    shift = best.masked_fill(best == -torch.inf, 0.0)
    total = total + torch.exp(sink[None, :, None] - shift)
    # Nothing picked and a sink of -inf: 0 / 0.
    return (out / total.masked_fill(total == 0, 1.0)).to(torch.bfloat16)


def sparse_attention(q: torch.Tensor, sink: torch.Tensor, *picked: Picked) -> torch.Tensor:
    """Attend to picked entries.

    Args:
        q: bfloat16 [T, H, D], normalised and rotated; D a power of two from 128 on.
        sink: float32 [H]; -inf for none.
        picked: one list, or the window's and the compressed entries'; both dense or both in pages. Blocks of 64 do
            not reach from one list into the next.

    Returns:
        bfloat16 [T, H, D]; not yet rotated back.

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or there are none or more than two lists.
    """
    require("q", q, torch.bfloat16, (None, None, None))
    queries, heads, dim = q.shape
    require("sink", sink, torch.float32, (heads,))
    if dim < 128 or dim & (dim - 1):
        raise ValueError(f"q has {dim} dimensions, expected a power of two from 128 on")
    if len(picked) not in (1, 2) or len({keys.layout is None for keys in picked}) > 1:
        raise ValueError(f"{len(picked)} lists of entries, expected one or two, all dense or all in pages")
    for keys in picked:
        require("indices", keys.indices, torch.int32, (queries, None))
        if keys.layout is not None:
            keys.layout.require_pages(keys.entries)
        else:
            require("entries", keys.entries, torch.bfloat16, (None, dim))
    if not use_triton(q):
        return sparse_attention_torch(q, sink, *picked)
    from v4quant.kernels._sparse_attention_triton import launch

    return launch(q, sink, picked)
