"""CSA's choice: which compressed entries each token attends to.

    score(t, e) = sum_h w_h(t) relu(q_h(t) . k_e),   w = weights_proj x * I^-1/2 H^-1/2;   the best k visible entries

T tokens, H heads of I dims (64 of 128), entries of ratio 4. Ranks that share the heads show each other their queries,
and each scores for all heads: sums and picks are those of one rank, bit by bit. Source: `Indexer` of DeepSeek's
released inference code.
"""

import torch

from v4quant.config import V4Config
from v4quant.kernels.indexer_scores import visible_entries
from v4quant.model.cache import PagedStore
from v4quant.model.chunk import Chunk, query_pieces
from v4quant.model.operations import Operations
from v4quant.model.ranks import Group
from v4quant.model.weights import IndexerWeights

RATIO = 4


def pick_entries(
    x: torch.Tensor,
    qr: torch.Tensor,
    cos_sin: torch.Tensor,
    weights: IndexerWeights,
    chunk: Chunk,
    keys: PagedStore,
    config: V4Config,
    ops: Operations,
    ranks: Group,
) -> torch.Tensor:
    """Pick entries for the tokens of a chunk, whose own keys are written.

    Args:
        x: activations [T, d].
        qr: normalised output of wq_a [T, q].
        cos_sin: float32 [T, R] at the tokens' positions.
        ranks: that share the heads.

    Returns:
        int32 [T, k], best first, -1 for none; k is index_topk, or the number of entries where that is smaller.
    """
    heads, dim = len(weights.weights_proj), config.index_head_dim  # of this rank
    q = torch.empty(len(x), heads, dim, dtype=ops.dtype, device=x.device)
    for piece in query_pieces(len(x), x.device):
        heads_of_piece = ops.linear(qr[piece], weights.wq_b).view(-1, heads, dim)  # [t, H, I]
        q[piece] = ops.index_queries(ops.rope_(heads_of_piece, cos_sin[piece]))
    scale = ops.plain_linear(x, weights.weights_proj) * (dim**-0.5 * config.index_n_heads**-0.5)  # [T, H]
    q, scale = ranks.join(q, 1), ranks.join(scale, 1)
    visible = visible_entries(chunk.positions, RATIO)  # [T]
    width = min(config.index_topk, max(run.end // RATIO for run in chunk.runs))
    picked = torch.full((len(x), width), -1, dtype=torch.int32, device=x.device)
    for run in chunk.runs:
        count, rows = run.end // RATIO, run.rows
        if count:
            of_sequence = keys.read(run.sequence, count)  # [E, I]
            for piece in query_pieces(rows.stop - rows.start, x.device):
                part = slice(rows.start + piece.start, rows.start + piece.stop)
                picked[part] = ops.pick(q[part], of_sequence, scale[part], visible[part], width)
    return picked
