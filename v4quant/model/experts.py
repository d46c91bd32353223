"""The mixture of experts of a block: SwiGLU experts of the tokens that were routed to them, and one that takes all.

    h = silu(min(w1 x, L)) * clamp(w3 x, -L, L) * r,   out = sum of w2 h over the token's experts, + shared expert

FP32 between the products, r the router's weight (1 for the shared expert), L the SwiGLU limit. T tokens, k a token.
Source: `Expert` and `MoE` of DeepSeek's released inference code; experts are added in ascending order, in FP32.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from threading import Lock
from typing import Protocol

import torch
from torch.nn import functional

from v4quant.kernels.act_quant_fp8 import act_quant_fp8
from v4quant.kernels.expert_order import ExpertOrder, sort_by_expert
from v4quant.kernels.fp4_expert_gemm import ExpertWeights, fp4_expert_gemm
from v4quant.model.operations import Operations
from v4quant.model.weights import Expert


class ExpertSource(Protocol):
    """Where the routed experts of one block come from."""

    is_coded: bool
    """True: `coded` gives them as they are stored; False: `each` runs them in BF16."""

    def coded(self, experts: list[int]) -> Iterator[tuple[list[int], ExpertWeights]]:
        """These experts in groups, in ascending order."""

    def each(self, experts: list[int], run: Callable[[int, Expert], torch.Tensor]) -> Iterator[torch.Tensor]:
        """What `run` makes of each of these experts, in ascending order; it may be called from several threads."""


def routed_experts(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    source: ExpertSource,
    count: int,
    limit: float,
    ops: Operations,
) -> torch.Tensor:
    """Run the routed experts.

    Args:
        x: normalised activations [T, d].
        indices: int64 [T, k], the experts of each token.
        weights: float32 [T, k].
        source: gives the experts that were picked, and is asked for no others.
        count: experts of the block.
        limit: swiglu_limit.

    Returns:
        float32 [T, d].
    """
    picked = torch.unique(indices).tolist()
    if source.is_coded:
        return _coded(x, indices, weights, source.coded(picked), limit)
    return _decoded(x, sort_by_expert(indices, weights, count), picked, source, limit, ops)


def shared_expert(x: torch.Tensor, expert: Expert, limit: float, ops: Operations) -> torch.Tensor:
    """Run the expert that takes every token: activations [T, d]."""
    return _expert(ops.prepare(x, expert.w1), expert, None, limit, ops)


def _coded(
    x: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    groups: Iterable[tuple[list[int], ExpertWeights]],
    limit: float,
) -> torch.Tensor:
    codes, scale_e8m0 = act_quant_fp8(x, 128)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for numbers, group in groups:
        # Experts by their place in the group, -1 for those outside of it.
        place = torch.full((max(int(indices.max()), *numbers) + 1,), -1, device=x.device)
        place[torch.tensor(numbers, device=x.device)] = torch.arange(len(numbers), device=x.device)
        order = sort_by_expert(place[indices], weights, len(numbers))
        out += fp4_expert_gemm(codes, scale_e8m0, order, group, limit)
    return out


def _decoded(
    x: torch.Tensor, order: ExpertOrder, picked: list[int], source: ExpertSource, limit: float, ops: Operations
) -> torch.Tensor:
    offset = order.offset.tolist()
    tokens = [order.token[first:stop] for first, stop in pairwise(offset)]
    weights = [order.weight[first:stop] for first, stop in pairwise(offset)]
    prepared: list[torch.Tensor] = []
    lock = Lock()

    def run(number: int, expert: Expert) -> torch.Tensor:
        with lock:  # once for all: experts are stored alike
            if not prepared:
                prepared.append(ops.prepare(x, expert.w1))
        return _expert(prepared[0][tokens[number]], expert, weights[number], limit, ops).float()

    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for number, y in zip(picked, source.each(picked, run), strict=True):
        out.index_add_(0, tokens[number], y)
    return out


def _expert(
    prepared: torch.Tensor, expert: Expert, weight: torch.Tensor | None, limit: float, ops: Operations
) -> torch.Tensor:
    gate = ops.multiply(prepared, expert.w1).float()  # [T, m]
    up = ops.multiply(prepared, expert.w3).float()
    h = functional.silu(gate.clamp_(max=limit)).mul_(up.clamp_(-limit, limit))
    if weight is not None:
        h.mul_(weight[:, None])
    return ops.linear(h.to(prepared.dtype), expert.w2)  # [T, d]
