"""top_k: the indices of a stable sort; ties, every BF16 number, rows with fewer entries than picks, none, poison."""

from typing import Any

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


@pytest.mark.parametrize(("entries", "k"), [(0, 3), (1, 1), (7, 16), (2048, 24), (4100, 257)])
def test_equals_the_reference(entries: int, k: int) -> None:
    random = torch.Generator().manual_seed(entries)
    # A row that sees almost everything, and where that is not all there is, one that sees nothing and one in between.
    visible = torch.tensor([entries] if entries < 2 else [entries - 1, 0, entries // 2], dtype=torch.int32)
    scores = ((torch.randn(len(visible), entries, generator=random) * 4).round() / 4).to(torch.bfloat16)  # many ties
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
    picks = top_k(scores, torch.tensor([4999], dtype=torch.int32), 200)
    assert picks.tolist() == [[4000, *range(199)]]


def test_scratch_ends_with_the_last_pick(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 256 picks they fill their row of scratch memory: one tie too many would lie in the next row's, or behind."""
    behind: list[torch.Tensor] = []
    empty = torch.empty

    def with_a_guard(rows: int, columns: int, **options: Any) -> torch.Tensor:
        memory = empty((rows + 1, columns), **options).fill_(-7)
        behind.append(memory[rows])
        return memory[:rows]

    monkeypatch.setattr(torch, "empty", with_a_guard)
    picks = top_k(torch.zeros(1, 300, dtype=torch.bfloat16), torch.tensor([300], dtype=torch.int32), 256)
    assert picks.tolist() == [list(range(256))]
    assert len(behind) == 2 and all(bool((guard == -7).all()) for guard in behind)
