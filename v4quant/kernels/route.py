"""Choice of experts for each token, and their weights.

    score  = sqrt(softplus(logit)),  softplus(x) = log(1 + exp(x))
    picks  = the k largest of score + bias            (hash layers: a table row for each token id)
    weight = score of a pick / sum over the picks * scale

T tokens, E experts, k picks a token (6 in V4), V token ids. All FP32; the bias decides the choice only. Equal values go
to the lower expert number, so that the choice is the same on every device. Source: `Gate` of DeepSeek's released
inference code. log(1 + exp(x)) as written loses everything below x = -16.6, and log1p does below -104, which would
make a weight of 0 / 0: below -20 the score is exp(x / 2), the same number to FP32.
"""

import torch

from v4quant.kernels._backend import require, use_triton

MAX_EXPERTS = 8192
MAX_PICKS = 64


def route_torch(logits: torch.Tensor, bias: torch.Tensor, k: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference for route: same arguments, any device; weights equal within a few FP32 ulps."""
    scores = _scores(logits)  # [T, E]
    # topk leaves open which of equal values it takes; a stable sort takes the first.
    experts = torch.sort(scores + bias, dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    return experts, _weights(scores, experts, scale)


def route_by_hash_torch(
    logits: torch.Tensor, token_ids: torch.Tensor, table: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference for route_by_hash: same arguments, any device; weights equal within a few FP32 ulps."""
    experts = table[token_ids]  # [T, k]
    return experts, _weights(_scores(logits), experts, scale)


def _scores(logits: torch.Tensor) -> torch.Tensor:
    return torch.where(logits < -20, (logits * 0.5).exp(), torch.nn.functional.softplus(logits).sqrt())


def _weights(scores: torch.Tensor, experts: torch.Tensor, scale: float) -> torch.Tensor:
    picked = scores.gather(1, experts)  # [T, k]
    return picked / picked.sum(-1, keepdim=True) * scale


def route(logits: torch.Tensor, bias: torch.Tensor, k: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick experts by score.

    Args:
        logits: float32 [T, E], contiguous; E up to 8192.
        bias: float32 [E].
        k: experts a token, at most E and 64.
        scale: routed_scaling_factor.

    Returns:
        experts int64 [T, k], best first, and weights float32 [T, k].

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape or k does not fit.
    """
    require("logits", logits, torch.float32, (None, None))
    count = logits.shape[1]
    require("bias", bias, torch.float32, (count,))
    if not 1 <= k <= min(count, MAX_PICKS) or count > MAX_EXPERTS:
        raise ValueError(f"k is {k} of {count} experts, expected 1 to {MAX_PICKS} of at most {MAX_EXPERTS}")
    if not use_triton(logits):
        return route_torch(logits, bias, k, scale)
    from v4quant.kernels._route_triton import launch

    return launch(logits, bias, k, scale)


def route_by_hash(
    logits: torch.Tensor, token_ids: torch.Tensor, table: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take experts from a table; their weights still come from the logits.

    Args:
        logits: float32 [T, E], contiguous.
        token_ids: int64 [T], each from 0 to V - 1; checked by the caller, as a device cannot raise.
        table: int64 [V, k], `tid2eid`, each from 0 to E - 1; checked by the caller.
        scale: routed_scaling_factor.

    Returns:
        experts int64 [T, k] and weights float32 [T, k].

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit.
    """
    require("logits", logits, torch.float32, (None, None))
    require("token_ids", token_ids, torch.int64, (logits.shape[0],))
    require("table", table, torch.int64, (None, None))
    if not 1 <= table.shape[1] <= MAX_PICKS:
        raise ValueError(f"table has {table.shape[1]} columns, expected 1 to {MAX_PICKS}")
    if not use_triton(logits):
        return route_by_hash_torch(logits, token_ids, table, scale)
    from v4quant.kernels._route_triton import launch_by_hash

    return launch_by_hash(logits, token_ids, table, scale)
