"""Inputs of the cache writers that find faults: wide spreads, zero blocks, sums that no order of summation changes."""

from typing import Any

import torch

# What untouched bytes of a page hold under test.
SENTINEL = 0x5A


def kv_tokens(count: int, dim: int) -> dict[str, Any]:
    """Arguments x, weight, eps, cos_sin of kv_write_fp8 or indexer_key_write_fp4; columns spread over six decades."""
    random = torch.Generator().manual_seed(3)
    angle = torch.rand(count, 32, generator=random) * 6
    spread = torch.logspace(-3, 3, dim)[torch.randperm(dim, generator=random)]
    return {
        "x": (torch.randn(count, dim, generator=random) * spread).to(torch.bfloat16),
        "weight": torch.rand(dim, generator=random) + 0.5,
        "eps": 1e-6,
        "cos_sin": torch.cat([angle.cos(), angle.sin()], 1),
    }


def exact_kv_tokens(count: int, dim: int) -> dict[str, Any]:
    """The same with rows whose squares sum up exactly in any order, multiples of 1/4 up to 8; some blocks are zero."""
    random = torch.Generator().manual_seed(count)
    x = torch.randint(-32, 33, (count, dim), generator=random) / 4
    x[::3, :64] = 0
    return {**kv_tokens(count, dim), "x": x.to(torch.bfloat16)}
