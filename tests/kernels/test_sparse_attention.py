"""sparse_attention, the torch reference: against its definition in float64, cases by hand, pages, refusals."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from v4quant.kernels.kv_cache import kv_read_fp8, kv_write_fp8
from v4quant.kernels.kv_layout import kv_layout
from v4quant.kernels.sparse_attention import Picked, sparse_attention
from v4quant.testing.closeness import assert_bf16_close
from v4quant.testing.kv_tokens import kv_tokens


def by_definition(q: torch.Tensor, sink: torch.Tensor, keys: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Blocks of 64 in float64; only the weights of the product are rounded to BF16."""
    out = np.zeros(q.shape)
    for t, h in np.ndindex(*q.shape[:2]):
        query, best, total, value = q[t, h].double().numpy(), -np.inf, 0.0, np.zeros(q.shape[2])
        for start in range(0, indices.shape[1], 64):
            block = indices[t, start : start + 64]
            if not len(block := block[block >= 0]):
                continue
            key = keys[block.long()].double().numpy()
            score = key @ query * q.shape[2] ** -0.5
            larger = max(best, score.max())
            weight = np.exp(score - larger)
            decay = np.exp(best - larger)
            total = total * decay + weight.sum()
            value = value * decay + weight.astype(ml_dtypes.bfloat16).astype(np.float64) @ key
            best = larger
        if total:
            out[t, h] = value / (total + np.exp(sink[h].item() - best))
    return torch.from_numpy(out).to(torch.bfloat16)


def case(queries: int, heads: int, dim: int, entries: int, picks: int) -> tuple[torch.Tensor, ...]:
    """Some queries with holes in their lists, one with an empty first block, one with nothing at all."""
    random = torch.Generator().manual_seed(queries + picks)
    q = torch.randn(queries, heads, dim, generator=random).to(torch.bfloat16)
    keys = torch.randn(entries, dim, generator=random).to(torch.bfloat16)
    indices = torch.randint(0, entries, (queries, picks), generator=random, dtype=torch.int32)
    indices[torch.rand(queries, picks, generator=random) < 0.2] = -1
    if queries > 2:
        indices[1, :64] = -1
        indices[2] = -1
    return q, torch.randn(heads, generator=random), keys, indices


@pytest.mark.parametrize(("queries", "heads", "dim", "picks"), [(7, 4, 128, 200), (3, 8, 512, 70), (1, 2, 128, 1)])
def test_agrees_with_the_definition(queries: int, heads: int, dim: int, picks: int) -> None:
    q, sink, keys, indices = case(queries, heads, dim, 90, picks)
    found = sparse_attention(q, sink, Picked(keys, indices))
    # float32 exponentials round some weights to the other BF16 number.
    assert_bf16_close(found, by_definition(q, sink, keys, indices), share=0.01)


def test_two_lists_are_one() -> None:
    q, sink, keys, indices = case(5, 4, 128, 90, 192)
    first, second = Picked(keys[:50], (indices[:, :128] % 50).contiguous()), Picked(keys, indices[:, 128:].contiguous())
    joined = torch.cat([first.indices, second.indices], 1)
    assert torch.equal(sparse_attention(q, sink, first, second), sparse_attention(q, sink, Picked(keys, joined)))


def test_pages_are_what_they_decode_to() -> None:
    q, sink, _, indices = case(5, 4, 512, 90, 100)
    layout = kv_layout(64)
    pages = layout.empty_pages(90)
    slots = torch.arange(90, dtype=torch.int32)
    kv_write_fp8(**kv_tokens(90, 512), pages=pages, slots=slots, layout=layout)
    dense = Picked(kv_read_fp8(pages, slots, layout), indices)
    assert torch.equal(sparse_attention(q, sink, Picked(pages, indices, layout)), sparse_attention(q, sink, dense))


def test_by_hand() -> None:
    """Equal scores: the mean of the keys, and a sink of the same size takes a third of the weight."""
    q = torch.zeros(3, 2, 128, dtype=torch.bfloat16)
    keys = torch.stack([torch.full((128,), 2.0), torch.full((128,), 4.0)]).to(torch.bfloat16)
    indices = torch.tensor([[0, 1], [1, -1], [-1, -1]], dtype=torch.int32)
    found = sparse_attention(q, torch.tensor([-torch.inf, 0.0]), Picked(keys, indices))
    assert found[:, :, 0].tolist() == [[3.0, 2.0], [4.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("sink", [torch.inf, 1000.0])
def test_a_sink_that_takes_everything(sink: float) -> None:
    q, _, keys, indices = case(4, 3, 128, 20, 30)
    assert not sparse_attention(q, torch.full((3,), sink), Picked(keys, indices)).any()


def test_the_sum_is_of_unrounded_weights() -> None:
    """Two keys of equal value: their weights cancel but for the rounding of the second one in the product."""
    q = torch.zeros(1, 1, 128, dtype=torch.bfloat16)
    q[0, 0, 0] = 1.0
    keys = torch.full((2, 128), 256.0, dtype=torch.bfloat16)
    keys[:, 0] = torch.tensor([0.0, -8.0])
    indices = torch.zeros(1, 2, dtype=torch.int32)
    indices[0, 1] = 1
    weight = np.exp(-8 * 128**-0.5)
    rounded = float(np.float32(weight).astype(ml_dtypes.bfloat16))
    assert rounded != weight
    found = sparse_attention(q, torch.tensor([-torch.inf]), Picked(keys, indices))[0, 0, 1].item()
    assert found == torch.tensor(256 * (1 + rounded) / (1 + weight)).to(torch.bfloat16).item()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 128)}, TypeError, "q is torch.float32"),
        ({"q": torch.zeros(2, 4, 96, dtype=torch.bfloat16)}, ValueError, "q has 96 dimensions"),
        ({"sink": torch.zeros(3)}, ValueError, r"sink has shape \[3\], expected \[4\]"),
        ({"picked": []}, ValueError, "0 lists of entries"),
        ({"indices": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "indices is torch.int64"),
        ({"indices": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, r"indices has shape \[3, 3\]"),
        ({"entries": torch.zeros(5, 64, dtype=torch.bfloat16)}, ValueError, r"entries has shape \[5, 64\]"),
    ],
)
def test_refusals(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    entries = changed.get("entries", torch.zeros(5, 128, dtype=torch.bfloat16))
    indices = changed.get("indices", torch.zeros(2, 3, dtype=torch.int32))
    q = changed.get("q", torch.zeros(2, 4, 128, dtype=torch.bfloat16))
    with pytest.raises(error, match=message):
        sparse_attention(q, changed.get("sink", torch.zeros(4)), *changed.get("picked", [Picked(entries, indices)]))


def test_dense_and_paged_lists_do_not_mix() -> None:
    layout, indices = kv_layout(2, 128), torch.zeros(1, 1, dtype=torch.int32)
    dense = Picked(torch.zeros(1, 128, dtype=torch.bfloat16), indices)
    with pytest.raises(ValueError, match="all dense or all in pages"):
        q = torch.zeros(1, 1, 128, dtype=torch.bfloat16)
        sparse_attention(q, torch.zeros(1), dense, Picked(layout.empty_pages(2), indices, layout))
