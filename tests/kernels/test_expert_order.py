"""Tokens sorted by expert: a case by hand, against a plain loop, experts that lie elsewhere, bounds of the grid."""

import pytest
import torch

from v4quant.kernels.expert_order import sort_by_expert, tile_bound


def test_by_hand() -> None:
    indices = torch.tensor([[2, 0], [0, -1], [4, 2]])
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    order = sort_by_expert(indices, weights, 5)
    assert order.offset.tolist() == [0, 2, 2, 4, 4, 5]
    assert order.token.tolist() == [0, 1, 0, 2, 2, 1]
    torch.testing.assert_close(order.weight, torch.tensor([0.2, 0.3, 0.1, 0.6, 0.5, 0.4]))
    assert order.row.tolist() == [[0, 2], [-1, 1], [3, 4]]
    assert (order.rows, order.experts) == (6, 5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_agrees_with_a_loop(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(5)
    indices = torch.randint(-1, 12, (57, 6), generator=random, dtype=dtype)
    weights = torch.rand(57, 6, generator=random)
    order = sort_by_expert(indices, weights, 12)
    for expert in range(12):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        rows = slice(int(order.offset[expert]), int(order.offset[expert + 1]))
        assert torch.equal(order.token[rows].long(), token)
        assert torch.equal(order.weight[rows], weights[token, slot])
        for row in range(rows.start, rows.stop):
            assert row in order.row[order.token[row]].tolist()
    assert int((order.row >= 0).sum()) == int(order.offset[12]) == int((indices >= 0).sum())
    assert torch.equal(order.row, order.row.sort(dim=1).values)


@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (0, 0)])
def test_nothing_to_sort(shape: tuple[int, int]) -> None:
    order = sort_by_expert(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape), 4)
    assert order.offset.tolist() == [0] * 5
    assert order.rows == 0
    assert order.row.shape == shape


@pytest.mark.parametrize("block", [1, 16, 64])
def test_no_split_needs_more_tiles_than_the_bound(block: int) -> None:
    random = torch.Generator().manual_seed(block)
    for rows in (0, 1, 5, 17, 300):
        worst = 0
        for _ in range(200):
            counts = torch.bincount(torch.randint(0, 5, (rows,), generator=random), minlength=5)
            worst = max(worst, int((-(-counts // block)).sum()))
        assert worst <= tile_bound(rows, 5, block)
    # Reached: every expert has one row more than fills its tiles.
    assert tile_bound(5 * (block + 1), 5, block) == 5 * -(-(block + 1) // block)


@pytest.mark.parametrize(
    ("indices", "weights", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3), TypeError, "indices are torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3).half(), TypeError, "weights torch.float16"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2), ValueError, "differ"),
        (torch.full((2, 3), 4), torch.zeros(2, 3), ValueError, "from 4 to 4, expected -1 to 3"),
        (torch.full((2, 3), -2), torch.zeros(2, 3), ValueError, "from -2 to -2"),
    ],
)
def test_refusals(indices: torch.Tensor, weights: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sort_by_expert(indices, weights, 4)
