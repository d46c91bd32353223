"""Which experts a token goes to: by score, or in hash layers by its id; see kernels/route."""

import torch

from v4quant.config import V4Config
from v4quant.kernels.route import route, route_by_hash
from v4quant.model.operations import Operations
from v4quant.model.weights import RouterWeights


def pick_experts(
    x: torch.Tensor, input_ids: torch.Tensor, weights: RouterWeights, config: V4Config, ops: Operations
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route tokens.

    Args:
        x: normalised activations [T, d].
        input_ids: int64 [T].

    Returns:
        experts int64 [T, k] and their weights float32 [T, k].
    """
    logits = ops.wide_linear(x.float(), weights.gate)  # [T, E]
    if weights.table is not None:
        return route_by_hash(logits, input_ids, weights.table, config.routed_scaling_factor)
    assert weights.bias is not None, "a router has a bias or a table"
    return route(logits, weights.bias, config.num_experts_per_tok, config.routed_scaling_factor)
