"""Attention of every query over the entries that it picked: the window's and the compressed ones, K = V.

    s_j = q . k_j x D^-1/2                                float32, j over the picked entries
    out = sum_j exp(s_j - m) k_j / (sum_j exp(s_j - m) + exp(sink - m)),   m = max_j s_j

The sink is a learned number a head that joins the denominator only. Keys come in blocks of 64 with an online softmax:
the sum is taken of float32 exp(s - m), then it is rounded to BF16 for the product with k, m being the largest score up
to that block. A row without any entry gives zeros. Two lists are one after the other, as there; the kernel begins a
block of its own with the second one, which is the same where the window has a multiple of 64 entries (it has 128).
Source: `sparse_attn_kernel` of DeepSeek's released inference code.

T queries, H heads, D the head dimension (512), E entries in a pool, L indices a query.
"""

from collections.abc import Sequence
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

    def of(self, queries: slice) -> "Picked":
        """The same, for some of the queries."""
        return Picked(self.entries, self.indices[queries], self.layout)

    def dense(self, dim: int) -> "Picked":
        """The same, of pages only what is picked: each entry is read once, however many queries look at it."""
        if self.layout is None:
            return self
        picked = self.indices >= 0
        used = torch.zeros(len(self.entries) * self.layout.entries, dtype=torch.bool, device=self.indices.device)
        used[self.indices[picked]] = True
        slots = used.nonzero()[:, 0].to(torch.int32)
        place = used.cumsum(0, dtype=torch.int32) - 1
        indices = torch.where(picked, place[self.indices.clamp(min=0)] if len(slots) else -1, -1).to(torch.int32)
        return Picked(kv_read_fp8_torch(self.entries, slots, self.layout, dim), indices)


def joined(picked: Sequence[Picked], dim: int) -> Picked:
    """Lists one after the other as one: dense entries [E, D], the first of them zeros, which index 0 for none takes.

    Its indices are int64 and count from 1.
    """
    lists = [keys.dense(dim) for keys in picked]
    entries = torch.cat([lists[0].entries.new_zeros(1, dim), *(keys.entries for keys in lists)])
    indices, first = [], 1
    for keys in lists:
        indices.append(torch.where(keys.indices < 0, 0, keys.indices + first).long())
        first += len(keys.entries)
    return Picked(entries, torch.cat(indices, 1))


def sparse_attention_torch(q: torch.Tensor, sink: torch.Tensor, *picked: Picked) -> torch.Tensor:
    """Reference for sparse_attention: same arguments, any device; a chunk of queries at a time."""
    queries, _, dim = q.shape
    keys = joined(picked, dim)
    chunk = max(1, CHUNK_BYTES // (4 * max(keys.indices.shape[1], 1) * dim))
    out = torch.empty_like(q)
    for start in range(0, queries, chunk):
        rows = slice(start, min(start + chunk, queries))
        out[rows] = _attend(q[rows].float(), sink, keys.entries, keys.indices[rows])
    return out


def _attend(q: torch.Tensor, sink: torch.Tensor, entries: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Attention of q, float32 [T, H, D], over entries [E, D] at indices [T, L], 0 for none."""
    queries, heads, dim = q.shape
    best = q.new_full((queries, heads, 1), -torch.inf)
    total = q.new_zeros(queries, heads, 1)
    out = q.new_zeros(queries, heads, dim)
    for block in torch.split(indices, BLOCK_KEYS, 1):  # [T, 64]
        if not block.any():
            continue
        keys = entries.index_select(0, block.flatten()).float().view(*block.shape, dim)  # [T, 64, D]
        scores = torch.bmm(q, keys.mT) * dim**-0.5  # [T, H, 64]
        scores.masked_fill_(block[:, None] == 0, -torch.inf)
        larger = torch.maximum(best, scores.amax(2, keepdim=True))  # [T, H, 1]
        shift = larger.masked_fill(larger == -torch.inf, 0.0)  # nothing picked yet: keep exp(-inf) = 0
        weight = torch.exp(scores - shift)  # [T, H, 64]
        decay = torch.exp(best - shift)
        total = total * decay + weight.sum(2, keepdim=True)
        out.mul_(decay).baddbmm_(weight.to(torch.bfloat16).float(), keys)
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
        picked: one list, or the window's and the compressed entries'; both dense or both in pages.

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
