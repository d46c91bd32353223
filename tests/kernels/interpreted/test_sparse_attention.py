"""sparse_attention: equal to the reference but for FP32 sums and exponentials; holes, empty rows, odd sizes, poison."""

import pytest
import torch

from v4quant.kernels._sparse_attention_triton import Launch, choose
from v4quant.kernels.kv_cache import kv_write_fp8_torch
from v4quant.kernels.kv_layout import kv_layout
from v4quant.kernels.sparse_attention import Picked, sparse_attention, sparse_attention_torch
from v4quant.testing.closeness import assert_bf16_close
from v4quant.testing.kv_tokens import kv_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# A last bit of exp() rounds a weight to the other BF16 number, 2^-8 of it, in about one of 1,000 weights.
SHARE = 0.01


def queries(count: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(count)
    return torch.randn(count, heads, dim, generator=random).to(torch.bfloat16), torch.randn(heads, generator=random)


def indices(count: int, picks: int, entries: int) -> torch.Tensor:
    """Lists with holes; the second row begins with 64 of them, the third has nothing else."""
    random = torch.Generator().manual_seed(count + picks)
    found = torch.randint(0, entries, (count, picks), generator=random, dtype=torch.int32)
    found[torch.rand(count, picks, generator=random) < 0.2] = -1
    found[1:2, :64] = -1
    found[2:3] = -1
    return found


def entries(count: int, dim: int, unread: torch.Tensor) -> torch.Tensor:
    """Keys, NaN where no list leads."""
    found = torch.randn(count, dim, generator=torch.Generator().manual_seed(count)).to(torch.bfloat16)
    found[unread] = torch.nan
    return found


@pytest.mark.parametrize(
    ("count", "heads", "dim", "picks"),
    [(4, 32, 512, 130), (4, 4, 128, 65), (1, 17, 128, 1), (3, 16, 128, 0), (0, 4, 128, 3)],
)
def test_dense(count: int, heads: int, dim: int, picks: int) -> None:
    q, sink = queries(count, heads, dim)
    keys = entries(40, dim, torch.arange(30, 40))
    picked = Picked(keys, indices(count, picks, 30))
    assert_bf16_close(sparse_attention(q, sink, picked), sparse_attention_torch(q, sink, picked), SHARE)


@pytest.mark.parametrize(("dim", "picks"), [(512, (128, 70)), (128, (64, 130)), (128, (0, 5))])
def test_two_lists_of_pages(dim: int, picks: tuple[int, int]) -> None:
    q, sink = queries(4, 8, dim)
    lists = []
    for entries_of_page, count in zip((64, 2), picks, strict=True):
        layout = kv_layout(entries_of_page, dim)
        pages = torch.full_like(layout.empty_pages(70), 0xFF)  # NaN in what is not written
        slots = torch.arange(0, 140, 2, dtype=torch.int32) % 70
        slots[35:] = -1
        kv_write_fp8_torch(**kv_tokens(70, dim), pages=pages, slots=slots, layout=layout)
        found = indices(4, count, 35)
        lists.append(Picked(pages, torch.where(found < 0, -1, found * 2), layout))
    assert_bf16_close(sparse_attention(q, sink, *lists), sparse_attention_torch(q, sink, *lists), SHARE)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # exp(1000) is infinity, as on devices
@pytest.mark.parametrize("sink", [torch.inf, -torch.inf, 1000.0, -1000.0])
def test_extreme_sinks(sink: float) -> None:
    q, _ = queries(4, 3, 128)
    picked = Picked(entries(20, 128, torch.arange(0)), indices(4, 70, 20))
    sinks = torch.full((3,), sink)
    found = sparse_attention(q, sinks, picked)
    assert_bf16_close(found, sparse_attention_torch(q, sinks, picked), SHARE)
    assert not found[2].any()


def test_choose() -> None:
    assert choose("sm_80") == choose("sm_90") == choose("sm_100") == Launch(heads=16, keys=64, num_warps=8)
    assert choose("gfx942") == Launch(heads=16, keys=32, num_warps=4)
    assert choose("sm_89") == choose("sm_120") == Launch(heads=16, keys=32, num_warps=8)


def test_two_dense_lists() -> None:
    q, sink = queries(4, 4, 128)
    lists = [
        Picked(entries(size, 128, torch.arange(0)), indices(4, picks, size)) for size, picks in ((9, 128), (70, 33))
    ]
    assert_bf16_close(sparse_attention(q, sink, *lists), sparse_attention_torch(q, sink, *lists), SHARE)
