"""indexer_scores: equal to the reference but for the order of the sum over heads; odd sizes, causality, poison."""

import pytest
import torch

from v4quant.kernels._indexer_scores_triton import Launch, choose
from v4quant.kernels.act_quant_fp4 import act_round_fp4
from v4quant.kernels.indexer_scores import indexer_scores, indexer_scores_torch, visible_entries
from v4quant.testing.closeness import bf16_steps

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    ("queries", "heads", "dim", "entries", "exact"),
    [
        (70, 8, 64, 200, True),
        (3, 64, 128, 300, True),
        (3, 64, 128, 129, False),
        (1, 4, 64, 1, False),
        (2, 8, 64, 0, True),
        (0, 8, 64, 5, True),
    ],
)
def test_equals_the_reference(queries: int, heads: int, dim: int, entries: int, exact: bool) -> None:
    random = torch.Generator().manual_seed(queries)
    q = act_round_fp4(torch.randn(queries * heads, dim, generator=random).to(torch.bfloat16)).view(-1, heads, dim)
    keys = act_round_fp4(torch.randn(entries, dim, generator=random).to(torch.bfloat16))
    # Powers of two as weights: sums of BF16 numbers that are exact in any order.
    weights = torch.randn(queries, heads, generator=random)
    weights = (weights.sign() if exact else weights).to(torch.bfloat16)
    visible = visible_entries(torch.arange(queries) * 4 * max(entries - 1, 1) // max(queries, 1), 4)
    keys[visible.max() if queries else 0 :] = torch.nan
    found = indexer_scores(q, keys, weights, visible)
    expected = indexer_scores_torch(q, keys, weights, visible)
    assert torch.equal(found.isfinite(), expected.isfinite())
    if exact:
        assert torch.equal(found, expected)
    steps = bf16_steps(found, expected)
    assert not steps.numel() or (steps > 0).float().mean() < 2e-3
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-4)


def test_choose() -> None:
    assert choose(1, 64) == Launch(queries=1, heads=64, num_warps=4)
    assert choose(4096, 8) == Launch(queries=16, heads=16, num_warps=4)
