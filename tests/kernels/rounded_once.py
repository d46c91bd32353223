"""query_norm_ with each step rounded once, as GPUs compute it; torch on a CPU rounds the leftover heads' root twice."""

import torch


def query_norm_rounded_once(q: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm of q, bfloat16 [T, H, D]."""
    mean = q.square().mean(-1, keepdim=True) + eps  # [T, H, 1]
    return q * torch.rsqrt(mean.float()).to(torch.bfloat16)
