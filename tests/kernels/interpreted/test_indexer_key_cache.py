"""indexer_key_cache: every byte equals the reference's; odd pages, slot -1, one token, none, poison around."""

import pytest
import torch

from v4quant.kernels.indexer_key_cache import (
    indexer_key_read_fp4,
    indexer_key_read_fp4_torch,
    indexer_key_write_fp4,
    indexer_key_write_fp4_torch,
)
from v4quant.kernels.kv_layout import key_layout
from v4quant.testing.kv_tokens import SENTINEL, exact_kv_tokens, kv_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("count", "dim", "entries"), [(50, 128, 64), (9, 128, 3), (1, 128, 64), (11, 64, 5), (0, 64, 4)]
)
def test_equals_the_reference(count: int, dim: int, entries: int, dtype: torch.dtype) -> None:
    layout = key_layout(entries, dim)
    token = exact_kv_tokens(count, dim)
    token["weight"] = token["weight"].to(dtype)
    slots = torch.randperm(2 * count + 4, generator=torch.Generator().manual_seed(1))[:count].to(torch.int32)
    slots[1::4] = -1
    token["x"][slots < 0] = torch.nan  # what is not written is not looked at
    pages = torch.full_like(layout.empty_pages(2 * count + 4), SENTINEL)
    expected = pages.clone()
    indexer_key_write_fp4(**token, pages=pages, slots=slots, layout=layout)
    indexer_key_write_fp4_torch(**token, pages=expected, slots=slots, layout=layout)
    assert torch.equal(pages, expected)
    found = indexer_key_read_fp4(pages, slots, layout, dim)
    same = indexer_key_read_fp4_torch(expected, slots, layout, dim)
    assert torch.equal(found.view(torch.int16), same.view(torch.int16))


def test_rows_whose_sums_round() -> None:
    layout, slots = key_layout(64), torch.arange(40, dtype=torch.int32)
    token = kv_tokens(40, 128)
    pages, expected = layout.empty_pages(40), layout.empty_pages(40)
    indexer_key_write_fp4(**token, pages=pages, slots=slots, layout=layout)
    indexer_key_write_fp4_torch(**token, pages=expected, slots=slots, layout=layout)
    assert (pages != expected).float().mean() < 2e-3


def test_zeros() -> None:
    layout = key_layout(4)
    pages = layout.empty_pages(4)
    token = {**kv_tokens(3, 128), "x": torch.zeros(3, 128, dtype=torch.bfloat16)}
    slots = torch.tensor([2, -1, 0], dtype=torch.int32)
    indexer_key_write_fp4(**token, pages=pages, slots=slots, layout=layout)
    assert pages[0, 256:272].tolist() == [1] * 4 + [0] * 4 + [1] * 4 + [0] * 4
    assert not indexer_key_read_fp4(pages, slots, layout).any()
