"""The K best entries of each row, best first.

    out = first K of sort(n < visible, by -score_n), then -1

T rows, N entries, K picks. Exact but for equal scores, of which the released inference code leaves the choice to
torch.topk: the reference takes torch's own, so that it picks what outputs of that code hold; the kernel takes the
smaller index, so that its picks are the same on every device. Scores are BF16, -0 equals 0; NaN and -inf have no
meaning, but bring no index that is not visible.
"""

import torch

from v4quant.kernels._backend import require, use_triton

MAX_K = 2048


def top_k_torch(scores: torch.Tensor, visible: torch.Tensor, k: int) -> torch.Tensor:
    """Reference for top_k: same arguments; of equal scores the ones that torch.topk takes on this device."""
    rows, entries = scores.shape
    out = torch.full((rows, k), -1, dtype=torch.int32, device=scores.device)
    hidden = torch.arange(entries, device=scores.device) >= visible[:, None]
    best = scores.masked_fill(hidden, -torch.inf).topk(min(k, entries), 1).indices  # [T, K]
    out[:, : best.shape[1]] = torch.where(best < visible[:, None], best, -1)
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
