"""top_k, the torch reference: against a stable sort, ties, zeros of both signs, NaN, refusals."""

import pytest
import torch

from v4quant.kernels.top_k import top_k


def assert_best(picks: torch.Tensor, scores: torch.Tensor, visible: torch.Tensor, k: int) -> None:
    """Distinct visible entries with the scores of a sort, then -1."""
    for row, found in enumerate(picks.tolist()):
        count = min(k, int(visible[row]))
        kept, rest = found[:count], found[count:]
        assert rest == [-1] * (k - count)
        assert len(set(kept)) == count
        assert all(0 <= entry < visible[row] for entry in kept)
        best = sorted(scores[row, : visible[row]].float().tolist(), reverse=True)[:count]
        assert [float(scores[row, entry]) for entry in kept] == best


@pytest.mark.parametrize(("entries", "k"), [(1, 1), (7, 16), (300, 24), (1000, 512)])
def test_agrees_with_a_sort(entries: int, k: int) -> None:
    random = torch.Generator().manual_seed(entries)
    scores = ((torch.randn(9, entries, generator=random) * 8).round() / 8).to(torch.bfloat16)  # many ties
    visible = torch.randint(0, entries + 1, (9,), generator=random, dtype=torch.int32)
    visible[0], visible[1] = entries, 0
    assert_best(top_k(scores, visible, k), scores, visible, k)


def test_every_bf16_in_order() -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    finite = bits[bits.isfinite()]
    shuffled = finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(2))][None]
    visible = torch.tensor([len(finite)], dtype=torch.int32)
    assert_best(top_k(shuffled, visible, 2048), shuffled, visible, 2048)


def test_zeros_of_both_signs_are_equal() -> None:
    scores = torch.tensor([[-0.0, 0.0, -1.0, -0.0, 1.0]], dtype=torch.bfloat16)
    assert top_k(scores, torch.tensor([5], dtype=torch.int32), 4).sort(1).values.tolist() == [[0, 1, 3, 4]]


def test_nan_brings_no_invisible_index() -> None:
    scores = torch.full((1, 8), torch.nan, dtype=torch.bfloat16)
    assert sorted(top_k(scores, torch.tensor([3], dtype=torch.int32), 5).tolist()[0]) == [-1, -1, 0, 1, 2]


def test_no_entries() -> None:
    picks = top_k(torch.zeros(2, 0, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32), 3)
    assert picks.tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize(
    ("scores", "visible", "k", "error", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32), 1, TypeError, "scores is torch.float32"),
        (torch.zeros(2, 4).bfloat16(), torch.zeros(2), 1, TypeError, "visible is torch.float32"),
        (torch.zeros(2, 4).bfloat16(), torch.zeros(3, dtype=torch.int32), 1, ValueError, r"visible has shape \[3\]"),
        (torch.zeros(2, 4).bfloat16(), torch.zeros(2, dtype=torch.int32), 0, ValueError, "k is 0, expected 1 to 2048"),
    ],
)
def test_refusals(scores: torch.Tensor, visible: torch.Tensor, k: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        top_k(scores, visible, k)
