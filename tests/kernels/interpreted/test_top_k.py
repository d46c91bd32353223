"""top_k: the indices of a stable sort; ties, every BF16 number, rows with fewer entries than picks, none, poison."""

import pytest
import torch

from v4quant.kernels.top_k import top_k
from v4quant.testing.tensors import every_finite_bf16

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def sorted_picks(scores: torch.Tensor, visible: torch.Tensor, k: int) -> list[list[int]]:
    """By Python's sort: of equal scores the smaller index first."""
    rows = []
    for row, limit in zip(scores.float().tolist(), visible.tolist(), strict=True):
        best = sorted(range(limit), key=lambda n: (-row[n], n))[:k]
        rows.append(best + [-1] * (k - len(best)))
    return rows


@pytest.mark.parametrize(("entries", "k"), [(0, 3), (1, 1), (7, 16), (2048, 24), (4100, 1024)])
def test_equals_the_reference(entries: int, k: int) -> None:
    random = torch.Generator().manual_seed(entries)
    scores = ((torch.randn(3, entries, generator=random) * 4).round() / 4).to(torch.bfloat16)  # many ties
    visible = torch.tensor([max(entries - 1, 0), 0, entries // 2], dtype=torch.int32)
    for row, limit in enumerate(visible.tolist()):
        scores[row, limit:] = torch.nan
    assert top_k(scores, visible, k).tolist() == sorted_picks(scores, visible, k)


def test_every_bf16() -> None:
    finite = every_finite_bf16(65280)
    scores = finite[:, torch.randperm(65280, generator=torch.Generator().manual_seed(2))]
    visible = torch.tensor([65280], dtype=torch.int32)
    assert top_k(scores, visible, 1000).tolist() == sorted_picks(scores, visible, 1000)


def test_equal_scores_go_by_index() -> None:
    scores = torch.zeros(1, 5000, dtype=torch.bfloat16)
    scores[0, ::2] *= -1  # -0
    scores[0, 4000] = 1
    picks = top_k(scores, torch.tensor([4999], dtype=torch.int32), 600)
    assert picks.tolist() == [[4000, *range(599)]]
