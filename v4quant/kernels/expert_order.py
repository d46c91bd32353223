"""Tokens sorted by expert: what lets one launch run every routed expert of a layer.

    row r of the sorted order is token token[r]; expert e owns rows offset[e] .. offset[e + 1]

T tokens, S experts picked by each (slots), E experts, A = T x S rows. Rows of one expert lie in the order of their
tokens, rows without an expert (index -1: the expert lies on another machine) behind all others. Everything is computed
on the tensors' device in shapes that depend on T, S and E alone, so nothing waits for the GPU.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExpertOrder:
    """A permutation of token-expert pairs.

    Attributes:
        token: int32 [A], the token of each row.
        weight: float32 [A], the router weight of each row.
        offset: int32 [E + 1], where each expert's rows begin; offset[E] rows have an expert.
        row: int32 [T, S], each token's rows in ascending order, which is that of their experts; -1 without an expert.
    """

    token: torch.Tensor
    weight: torch.Tensor
    offset: torch.Tensor
    row: torch.Tensor

    @property
    def rows(self) -> int:
        """A."""
        return self.token.numel()

    @property
    def experts(self) -> int:
        """E."""
        return self.offset.numel() - 1


def sort_by_expert(indices: torch.Tensor, weights: torch.Tensor, experts: int) -> ExpertOrder:
    """Sort the router's picks by expert.

    Args:
        indices: int32 or int64 [T, S], the experts of each token; -1 for none.
        weights: float32 [T, S], the router weights.
        experts: E.

    Raises:
        TypeError: if a dtype is another.
        ValueError: if shapes differ, or (on CPU, where looking costs nothing) an index is not in -1 .. E - 1.
    """
    if indices.dtype not in (torch.int32, torch.int64) or weights.dtype != torch.float32:
        raise TypeError(f"indices are {indices.dtype}, weights {weights.dtype}; expected int32 or int64, and float32")
    if indices.dim() != 2 or indices.shape != weights.shape:
        raise ValueError(f"indices {list(indices.shape)} and weights {list(weights.shape)} differ, or are not [T, S]")
    if not indices.is_cuda and indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < experts:
        raise ValueError(f"indices go from {int(indices.min())} to {int(indices.max())}, expected -1 to {experts - 1}")
    slots = indices.shape[1]
    expert = torch.where(indices < 0, experts, indices).reshape(-1)  # [A]
    expert, order = expert.sort(stable=True)  # [A]
    bounds = torch.arange(experts + 1, device=indices.device, dtype=expert.dtype)
    offset = torch.searchsorted(expert, bounds).to(torch.int32)  # [E + 1]
    position = torch.arange(order.numel(), device=indices.device, dtype=torch.int32)  # [A]
    row = torch.empty_like(position).scatter_(0, order, position)  # [A], the inverse permutation
    row = torch.where(row < offset[experts], row, -1).reshape(indices.shape).sort(dim=1).values  # [T, S]
    return ExpertOrder((order // max(slots, 1)).to(torch.int32), weights.reshape(-1)[order], offset, row)


def tile_bound(rows: int, experts: int, block_tokens: int) -> int:
    """The most tiles of block_tokens rows that `rows` rows of `experts` experts can need; no tile spans two experts."""
    # n rows of one expert need (n + block - 1) // block tiles; at most min(rows, experts) experts have any.
    return (rows + min(rows, experts) * (block_tokens - 1)) // block_tokens
