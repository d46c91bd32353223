"""indexer_scores, the torch reference: against float64 with each rounding by ml_dtypes, causality, refusals."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from v4quant.kernels.act_quant_fp4 import act_round_fp4
from v4quant.kernels.indexer_scores import indexer_scores, visible_entries


def case(queries: int, heads: int, dim: int, entries: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(queries)
    q = act_round_fp4(torch.randn(queries * heads, dim, generator=random).to(torch.bfloat16))
    return {
        "q": q.view(queries, heads, dim),
        "keys": act_round_fp4(torch.randn(entries, dim, generator=random).to(torch.bfloat16)),
        "weights": torch.randn(queries, heads, generator=random).to(torch.bfloat16),
        "visible": visible_entries(torch.arange(queries) * 4 * max(entries, 1) // queries, 4),
    }


@pytest.mark.parametrize(("queries", "heads", "dim", "entries"), [(5, 64, 128, 37), (3, 4, 64, 9), (1, 8, 128, 1)])
def test_agrees_with_float64(queries: int, heads: int, dim: int, entries: int) -> None:
    given = case(queries, heads, dim, entries)
    q, keys, weights = (given[name].double().numpy() for name in ("q", "keys", "weights"))

    def bf16(x: Any) -> Any:
        return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)

    score = np.maximum(bf16(np.einsum("thi,ni->thn", q, keys)), 0)
    expected = bf16(bf16(score * weights[:, :, None]).sum(1))
    expected[np.arange(entries)[None] >= given["visible"].numpy()[:, None]] = -np.inf
    found = indexer_scores(**given).double().numpy()
    # Sums over heads in float32 may round to the other BF16 number.
    differ = found != expected
    assert differ.mean() < 0.01
    np.testing.assert_allclose(found[differ], expected[differ], rtol=2**-7)


def test_visible_entries() -> None:
    """Query t sees CSA entry j from t = 4j + 3 on, HCA entry j from t = 128j + 127 on."""
    assert visible_entries(torch.tensor([0, 2, 3, 6, 7, 8]), 4).tolist() == [0, 0, 1, 1, 2, 2]
    assert visible_entries(torch.tensor([126, 127, 254, 255]), 128).tolist() == [0, 1, 1, 2]


def test_keys_that_are_not_visible_do_not_matter() -> None:
    given = case(4, 4, 128, 10)
    given["visible"] = torch.tensor([0, 3, 3, 1], dtype=torch.int32)
    expected = indexer_scores(**given)
    given["keys"][3:] = torch.nan
    assert torch.equal(indexer_scores(**given), expected)
    assert bool((expected[:, 3:] == -torch.inf).all())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 128)}, TypeError, "q is torch.float32"),
        ({"q": torch.zeros(2, 4, 96, dtype=torch.bfloat16)}, ValueError, "q has 96 dimensions"),
        ({"keys": torch.zeros(3, 64, dtype=torch.bfloat16)}, ValueError, r"keys has shape \[3, 64\]"),
        ({"weights": torch.zeros(2, 4)}, TypeError, "weights is torch.float32"),
        ({"visible": torch.zeros(2, dtype=torch.int64)}, TypeError, "visible is torch.int64"),
    ],
)
def test_refusals(changed: dict[str, torch.Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        indexer_scores(**{**case(2, 4, 128, 3), **changed})
