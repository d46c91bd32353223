"""The K best entries of each row, best first; of equal scores the one of smaller index first.

    out = first K of sort(n < visible, by (-score_n, n)), then -1

T rows, N entries, K picks. Exact and the same on every device: the released inference code leaves ties to torch.topk,
which says nothing of them. Scores are BF16, -0 equals 0; NaN has no meaning, but brings no index that is not visible.
"""

import torch

from v4quant.kernels._backend import require, use_triton

MAX_K = 2048
# Sort keys of a chunk of rows, int64.
CHUNK_BYTES = 8 * 2**20


def top_k_torch(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    """Reference for top_k: same arguments, same indices, any device."""
    rows, entries = scores.shape
    out = torch.full((rows, k), -1, dtype=torch.int32, device=scores.device)
    column = torch.arange(entries, device=scores.device)
    chunk = max(1, CHUNK_BYTES // (8 * max(entries, 1)))
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        # Integers in the order of the scores, and the complement of the index below them: no two are equal.
        bits = scores[part].view(torch.int16).long()
        bits = torch.where(bits >= 0, bits, torch.where(bits == -0x8000, 0, -0x8000 - bits))
        order = ((bits + 0x8000) << 32) | (0xFFFFFFFF - column)
        order = torch.where(column < visible[part, None], order, -1)
        best = order.topk(min(k, entries), 1).values
        out[part, : best.shape[1]] = torch.where(best < 0, -1, 0xFFFFFFFF - (best & 0xFFFFFFFF)).to(torch.int32)
    return out


def top_k(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    """Pick the best entries.

    Args:
        scores: bfloat16 [T, N], contiguous; from `visible` on they are not looked at.
        visible: int32 [T], entries of a row that may be picked, 0 to N.
        k: picks, 1 to 2048.

    Returns:
        int32 [T, K].

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape or k does not fit.
    """
    require("scores", scores, torch.bfloat16, (None, None))
    require("visible", visible, torch.int32, (scores.shape[0],))
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k is {k}, expected 1 to {MAX_K}")
    if not use_triton(scores):
        return top_k_torch(scores, visible, k)
    from v4quant.kernels._top_k_triton import launch

    return launch(scores, visible, k)
