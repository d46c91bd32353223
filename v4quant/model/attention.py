"""Attention of a block: a window of the last tokens, and compressed entries of those before; keys are values, one head.

    qr = norm(wq_a x), q = rope(headnorm(wq_b qr)), kv = rope(norm(wkv x)) into the cache
    entries: the window's, oldest first, then CSA's picks or all of HCA's;   o = attend(q, entries), rotated back
    out = wo_b (wo_a o, group by group)

T tokens, H heads of D dims, W window. Ranks that share heads and groups each have all entries and add their products
with wo_b, in FP32, before the sum becomes BF16. Source: `Attention` of DeepSeek's released inference code.
"""

from dataclasses import dataclass

import torch

from v4quant.config import V4Config
from v4quant.kernels.indexer_scores import visible_entries
from v4quant.kernels.sparse_attention import Picked
from v4quant.model.cache import BlockCache
from v4quant.model.chunk import Chunk, query_pieces
from v4quant.model.compressor import compress
from v4quant.model.indexer import pick_entries
from v4quant.model.operations import Operations
from v4quant.model.ranks import Group
from v4quant.model.rope import Rotation
from v4quant.model.weights import AttentionWeights


@dataclass(frozen=True)
class Attended:
    """What attention gives.

    Attributes:
        out: activations [T, d].
        picks: the indexer's int32 [T, k], -1 for none; None without an indexer.
    """

    out: torch.Tensor
    picks: torch.Tensor | None


def attention(
    x: torch.Tensor,
    weights: AttentionWeights,
    chunk: Chunk,
    cache: BlockCache,
    rotation: Rotation,
    config: V4Config,
    ops: Operations,
    ranks: Group,
) -> Attended:
    """Attend, and take the chunk's tokens into the cache.

    Args:
        x: normalised activations [T, d].
        ranks: that share the heads.
    """
    cache.reserve(chunk)
    cos_sin = rotation.at(chunk.positions)  # [T, R]
    prepared = ops.prepare(x, weights.wq_a)  # wkv is stored alike
    qr = ops.rms_norm(ops.multiply(prepared, weights.wq_a), weights.q_norm)  # [T, q]
    kv = ops.multiply(prepared, weights.wkv)  # [T, D]
    cache.window.write(kv, weights.kv_norm, cos_sin, chunk.sequences, chunk.positions)
    picked = [cache.window.picked(chunk.sequences, window_entries(chunk.positions, config.sliding_window))]
    picks = None
    if weights.compressor is not None and cache.compressed is not None and cache.state is not None:
        compress(x, weights.compressor, chunk, cache.compressed, cache.state, rotation, ops)
        if weights.indexer is not None and cache.keys is not None and cache.key_state is not None:
            compress(x, weights.indexer.compressor, chunk, cache.keys, cache.key_state, rotation, ops)
            picks = pick_entries(x, qr, cos_sin, weights.indexer, chunk, cache.keys, config, ops, ranks)
        entries = all_entries(chunk, weights.compressor.ape.shape[0]) if picks is None else picks
        picked.append(cache.compressed.picked(chunk.sequences, entries))
    is_shared = ranks.size > 1
    out = x.new_empty(len(x), weights.wo_a.shape[0] * weights.wo_a.shape[1]) if is_shared else torch.empty_like(x)
    for piece in query_pieces(len(x), x.device):
        part = [keys.of(piece) for keys in picked]
        groups = _attend(qr[piece], cos_sin[piece], part, weights, config, ops, ranks)
        out[piece] = groups if is_shared else ops.linear(groups, weights.wo_b)
    if is_shared:
        out = ranks.sum(ops.partial(out, weights.wo_b)).to(x.dtype)
    cache.trim(chunk)
    return Attended(out, picks)


def _attend(
    qr: torch.Tensor,
    cos_sin: torch.Tensor,
    picked: list[Picked],
    weights: AttentionWeights,
    config: V4Config,
    ops: Operations,
    ranks: Group,
) -> torch.Tensor:
    """From some queries' input [t, q] and the entries that they picked to what wo_b takes, [t, g r]."""
    q = ops.linear(qr, weights.wq_b).view(len(qr), -1, config.head_dim)  # [t, H, D]
    q = ops.rope_(ops.query_norm_(q, ranks), cos_sin)
    out = ops.rope_(ops.attend(q, weights.sink, picked), cos_sin, inverse=True)  # [t, H, D]
    return ops.grouped_linear(out.view(len(qr), len(weights.wo_a), -1), weights.wo_a).flatten(1)


def window_entries(positions: torch.Tensor, window: int) -> torch.Tensor:
    """Entries of the window that ends at each position, oldest first, -1 behind the last: int32 [T, W or fewer]."""
    longest = min(window, int(positions.max()) + 1)
    offsets = torch.arange(longest, dtype=torch.int32, device=positions.device)
    entries = (positions[:, None] - window + 1).clamp(min=0) + offsets  # [T, W]
    return torch.where(entries > positions[:, None], -1, entries)


def all_entries(chunk: Chunk, ratio: int) -> torch.Tensor:
    """Every compressed entry that is visible at each position, -1 behind the last: int32 [T, E]."""
    count = max(run.end // ratio for run in chunk.runs)
    entries = torch.arange(count, dtype=torch.int32, device=chunk.positions.device).expand(len(chunk.positions), count)
    return torch.where(entries < visible_entries(chunk.positions, ratio)[:, None], entries, -1)
