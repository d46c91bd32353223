"""kv_cache: every byte equals the reference's; pages of several sizes, slot -1, one token, none, poison around."""

import pytest
import torch

from v4quant.kernels.kv_cache import kv_read_fp8, kv_read_fp8_torch, kv_write_fp8, kv_write_fp8_torch
from v4quant.kernels.kv_layout import kv_layout
from v4quant.testing.kv_tokens import SENTINEL, exact_kv_tokens, kv_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("count", "dim", "entries"), [(20, 512, 2), (9, 512, 64), (1, 512, 256), (11, 128, 3), (0, 128, 4)]
)
def test_equals_the_reference(count: int, dim: int, entries: int, dtype: torch.dtype) -> None:
    layout = kv_layout(entries, dim)
    token = exact_kv_tokens(count, dim)
    token["weight"] = token["weight"].to(dtype)
    slots = torch.randperm(2 * count + 4, generator=torch.Generator().manual_seed(1))[:count].to(torch.int32)
    slots[::4] = -1
    token["x"][slots < 0] = torch.nan  # what is not written is not looked at
    pages = torch.full_like(layout.empty_pages(2 * count + 4), SENTINEL)
    expected = pages.clone()
    kv_write_fp8(**token, pages=pages, slots=slots, layout=layout)
    kv_write_fp8_torch(**token, pages=expected, slots=slots, layout=layout)
    assert torch.equal(pages, expected)
    found = kv_read_fp8(pages, slots, layout, dim)
    assert torch.equal(found.view(torch.int16), kv_read_fp8_torch(expected, slots, layout, dim).view(torch.int16))


def test_rows_whose_sums_round() -> None:
    """Sums in another order turn a byte over now and then: the value then differs by one E4M3 step, a 16th at most."""
    layout, slots = kv_layout(64), torch.arange(40, dtype=torch.int32)
    token = kv_tokens(40, 512)
    pages, expected = layout.empty_pages(40), layout.empty_pages(40)
    kv_write_fp8(**token, pages=pages, slots=slots, layout=layout)
    kv_write_fp8_torch(**token, pages=expected, slots=slots, layout=layout)
    assert (pages != expected).float().mean() < 1e-3
    found = kv_read_fp8(pages, slots, layout).float()
    torch.testing.assert_close(found, kv_read_fp8(expected, slots, layout).float(), rtol=1 / 8, atol=1e-6)


def test_every_code_is_read() -> None:
    layout = kv_layout(2)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0  # NaN is never written
    pages = torch.full((1, layout.page_bytes), 0xFF, dtype=torch.uint8)
    pages[0, :448] = torch.cat([codes, codes[:192]])
    pages[0, 448:576] = torch.arange(128, dtype=torch.uint8) * 2 % 127  # finite BF16, subnormals among them
    pages[0, 1152:1160] = torch.tensor([105, 119, 127, 128, 140, 200, 110, 0])
    slots = torch.tensor([-1, 0, -1], dtype=torch.int32)
    found = kv_read_fp8(pages, slots, layout)
    assert torch.equal(found.view(torch.int16), kv_read_fp8_torch(pages, slots, layout, 512).view(torch.int16))
