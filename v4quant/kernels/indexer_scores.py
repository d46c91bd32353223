"""How much each query of the indexer wants each compressed entry.

    s_th  = bf16(q_th . k_n)
    score = bf16(sum_h bf16(relu(s_th) * w_th))        -inf for entries that the query may not see

T queries, H heads of the indexer (64), I their dimension (128), N entries of one sequence. Queries and keys were
rounded to FP4, so products are exact and most sums are, too. A query at position p sees the entries
n < (p + 1) // ratio. Source: `Indexer.forward` of DeepSeek's released inference code, whose products and sums come out
in BF16.
"""

import torch

from v4quant.kernels._backend import require, use_triton

# Scores of all heads for a chunk of queries, float32.
CHUNK_BYTES = 8 * 2**20


def visible_entries(positions: torch.Tensor, ratio: int) -> torch.Tensor:
    """Entries that queries at these positions see: int32 [T] of integers [T]."""
    return ((positions + 1) // ratio).to(torch.int32)


def indexer_scores_torch(
    q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """Reference for indexer_scores: same arguments, any device; a chunk of queries at a time."""
    queries, heads, _ = q.shape
    entries = len(keys)
    out = torch.empty(queries, entries, dtype=torch.bfloat16, device=q.device)
    chunk = max(1, CHUNK_BYTES // (4 * heads * max(entries, 1)))
    transposed = keys.float().T  # [I, N]
    column = torch.arange(entries, device=q.device)
    for start in range(0, queries, chunk):
        rows = slice(start, min(start + chunk, queries))
        score = (q[rows].float() @ transposed).to(torch.bfloat16)  # [T, H, N]
        weighted = score.relu_() * weights[rows, :, None]
        summed = weighted.sum(1, dtype=torch.float32).to(torch.bfloat16)  # [T, N]
        out[rows] = summed.masked_fill_(column >= visible[rows, None], -torch.inf)
    return out


def indexer_scores(q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Score the compressed entries of one sequence.

    Args:
        q: bfloat16 [T, H, I], after RoPE, Hadamard and rounding to FP4; I a power of two from 16 to 128.
        keys: bfloat16 [N, I], as indexer_key_read_fp4 gives them.
        weights: bfloat16 [T, H], the output of weights_proj times I^-1/2 H^-1/2.
        visible: int32 [T], visible_entries(positions, ratio); keys from there on are not looked at.

    Returns:
        bfloat16 [T, N].

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    require("q", q, torch.bfloat16, (None, None, None))
    queries, heads, dim = q.shape
    if not 16 <= dim <= 128 or dim & (dim - 1):
        raise ValueError(f"q has {dim} dimensions, expected a power of two from 16 to 128")
    require("keys", keys, torch.bfloat16, (None, dim))
    require("weights", weights, torch.bfloat16, (queries, heads))
    require("visible", visible, torch.int32, (queries,))
    if not use_triton(q):
        return indexer_scores_torch(q, keys, weights, visible)
    from v4quant.kernels._indexer_scores_triton import launch

    return launch(q, keys, weights, visible)
