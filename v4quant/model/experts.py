"""The mixture of experts of a block: SwiGLU experts of the tokens that were routed to them, and one that takes all.

    h = silu(min(w1 x, L)) * clamp(w3 x, -L, L) * r,   out = sum of w2 h over the token's experts, + shared expert

FP32 between the products, r the router's weight (1 for the shared expert), L the SwiGLU limit. T tokens, k a token.
Source: `Expert` and `MoE` of DeepSeek's released inference code; experts are added in ascending order, in FP32.
Several runs may ask the same experts at once, so that each is read once; each run's sums are those of a run alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Protocol, TypeVar

import torch

from v4quant.kernels.act_quant_fp8 import act_quant_fp8
from v4quant.kernels.expert_order import ExpertOrder, sort_by_expert
from v4quant.kernels.fp4_expert_gemm import ExpertWeights, fp4_expert_gemm
from v4quant.model.operations import Operations, multiply_each
from v4quant.model.weights import Expert

_Made = TypeVar("_Made")


class ExpertSource(Protocol):
    """Where the routed experts of one block come from."""

    held: range
    """Those that it has; other ranks have the others."""

    is_coded: bool
    """True: `coded` gives them as they are stored; False: `each` runs them in BF16."""

    def coded(self, experts: list[int]) -> Iterator[tuple[list[int], ExpertWeights]]:
        """These experts in groups, in ascending order."""

    def each(self, experts: list[int], run: Callable[[int, Expert], _Made]) -> Iterator[_Made]:
        """What `run` makes of each of these experts, in ascending order; it may be called from several threads."""


@dataclass(frozen=True)
class Asked:
    """What one run asks of a block's routed experts.

    Attributes:
        x: normalised activations [T, d].
        indices: int64 [T, k], the experts of each token.
        weights: float32 [T, k].
        count: experts of the block.
        limit: swiglu_limit.
        ops: the run's operations.
    """

    x: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    count: int
    limit: float
    ops: Operations

    @cached_property
    def order(self) -> ExpertOrder:
        """Its tokens by expert."""
        return sort_by_expert(self.indices, self.weights, self.count)

    @cached_property
    def offset(self) -> list[int]:
        """Where each expert's rows begin in the order."""
        return list(self.order.offset.tolist())

    def rows(self, expert: int) -> slice:
        """The rows of an expert in the order."""
        return slice(self.offset[expert], self.offset[expert + 1])

    def empty(self) -> torch.Tensor:
        """Sums to begin with: float32 [T, d]."""
        return torch.zeros(self.x.shape, dtype=torch.float32, device=self.x.device)


def routed_experts(asked: Sequence[Asked], source: ExpertSource) -> list[torch.Tensor]:
    """Run the routed experts for one or more runs.

    Args:
        asked: one of each run.
        source: gives the experts that were picked, and is asked for no others.

    Returns:
        float32 [T, d] of each: sums over the experts that the source holds.
    """
    every = torch.unique(torch.cat([own.indices.flatten() for own in asked])).tolist()
    picked = [expert for expert in every if expert in source.held]
    if source.is_coded:
        return _coded(asked, source.coded(picked))
    return _decoded(asked, picked, source)


def shared_expert(x: torch.Tensor, expert: Expert, limit: float, ops: Operations) -> torch.Tensor:
    """Run the expert that takes every token: activations [T, d]."""
    return _expert([_Rows(ops.prepare(x, expert.w1), None, limit, ops)], expert)[0]


def _coded(asked: Sequence[Asked], groups: Iterable[tuple[list[int], ExpertWeights]]) -> list[torch.Tensor]:
    quantised = [act_quant_fp8(own.x, 128) for own in asked]
    out = [own.empty() for own in asked]
    for numbers, group in groups:
        for own, (codes, scale_e8m0), total in zip(asked, quantised, out, strict=True):
            # Experts by their place in the group, -1 for those outside of it.
            place = torch.full((max(own.count, *numbers) + 1,), -1, device=own.x.device)
            place[torch.tensor(numbers, device=own.x.device)] = torch.arange(len(numbers), device=own.x.device)
            order = sort_by_expert(place[own.indices], own.weights, len(numbers))
            total += fp4_expert_gemm(codes, scale_e8m0, order, group, own.limit)
    return out


@dataclass(frozen=True)
class _Rows:
    """Tokens of one run in one expert: prepared activations [t, d], float32 weights [t] or None for 1."""

    prepared: torch.Tensor
    weight: torch.Tensor | None
    limit: float
    ops: Operations


def _decoded(asked: Sequence[Asked], picked: list[int], source: ExpertSource) -> list[torch.Tensor]:
    prepared: list[torch.Tensor] = []
    lock = Lock()

    def run(number: int, expert: Expert) -> list[tuple[int, torch.Tensor]]:
        with lock:  # once for all: experts are stored alike
            if not prepared:
                prepared.extend(own.ops.prepare(own.x, expert.w1) for own in asked)
        takers, rows = [], []
        for place, own in enumerate(asked):
            part = own.rows(number)
            if part.start < part.stop:
                takers.append(place)
                x = prepared[place][own.order.token[part]]
                rows.append(_Rows(x, own.order.weight[part], own.limit, own.ops))
        return list(zip(takers, [y.float() for y in _expert(rows, expert)], strict=True))

    for own in asked:
        _ = own.offset  # sorted before threads ask for it
    out = [own.empty() for own in asked]
    for number, made in zip(picked, source.each(picked, run), strict=True):
        for place, y in made:
            out[place].index_add_(0, asked[place].order.token[asked[place].rows(number)], y)
    return out


def _expert(rows: Sequence[_Rows], expert: Expert) -> list[torch.Tensor]:
    """The output of an expert, activations [t, d], for the tokens of each run."""
    ops, prepared = [own.ops for own in rows], [own.prepared for own in rows]
    gates = multiply_each(ops, prepared, expert.w1)  # [t, m]
    ups = multiply_each(ops, prepared, expert.w3)
    hidden = []
    for own, gate, up in zip(rows, gates, ups, strict=True):
        h = own.ops.swiglu(gate, up, own.limit)
        if own.weight is not None:
            h.mul_(own.weight[:, None])
        hidden.append(own.ops.prepare(h.to(own.prepared.dtype), expert.w2))
    return multiply_each(ops, hidden, expert.w2)  # [t, d]
