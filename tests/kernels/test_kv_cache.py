"""kv_cache, the torch reference: bytes by hand and by ml_dtypes, the round trip, untouched bytes, refusals."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from v4quant.kernels.kv_cache import kv_read_fp8, kv_write_fp8
from v4quant.kernels.kv_layout import PageLayout, key_layout, kv_layout
from v4quant.kernels.rms_norm import rms_norm_torch
from v4quant.testing.kv_tokens import SENTINEL, kv_tokens


def simulated(x: torch.Tensor, weight: torch.Tensor, eps: float, cos_sin: torch.Tensor) -> torch.Tensor:
    """What the released code computes with: complex RoPE, then quantised and decoded by ml_dtypes in float64."""
    y = rms_norm_torch(x, weight, eps)
    pairs = torch.view_as_complex(y[:, -64:].float().reshape(-1, 32, 2))
    rope = torch.view_as_real(pairs * torch.complex(cos_sin[:, :32], cos_sin[:, 32:])).flatten(1).to(torch.bfloat16)
    blocks = y[:, :-64].double().numpy().reshape(len(x), -1, 64)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(blocks).max(2, keepdims=True), 1e-4) / 448))
    codes = (blocks / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    decoded = torch.from_numpy(codes.astype(np.float64) * scale).reshape(len(x), -1)
    return torch.cat([decoded.to(torch.bfloat16), rope], 1)


@pytest.mark.parametrize("dim", [128, 512])
def test_the_round_trip_is_the_simulation(dim: int) -> None:
    token = kv_tokens(37, dim)
    layout = kv_layout(8, dim)
    pages = layout.empty_pages(50)
    slots = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:37].to(torch.int32)
    kv_write_fp8(**token, pages=pages, slots=slots, layout=layout)
    found = kv_read_fp8(pages, slots, layout, dim)
    # torch's complex product may fuse: the RoPE part by value, one BF16 number apart.
    expected = simulated(**token)
    assert torch.equal(found[:, :-64], expected[:, :-64])
    torch.testing.assert_close(found[:, -64:], expected[:, -64:], rtol=2**-7, atol=1e-6)


def test_where_bytes_lie() -> None:
    """Entry 1 of page 1 of three: a row of ones but for one block of zeros, and 3 and 4 turned by a right angle."""
    layout = kv_layout(3)
    assert layout == PageLayout(entries=3, data_bytes=576, scale_bytes=8, pad_to=576)
    assert layout.page_bytes == 2304  # 3 x 584 = 1752, then padding
    x = torch.ones(1, 512, dtype=torch.bfloat16)
    weight = torch.ones(512)
    weight[64:128] = 0
    weight[-2:] = torch.tensor([3.0, 4.0])
    cos_sin = torch.cat([torch.ones(1, 32), torch.zeros(1, 32)], 1)
    cos_sin[0, 31], cos_sin[0, 63] = 0.0, 1.0
    pages = torch.full((2, layout.page_bytes), SENTINEL, dtype=torch.uint8)
    slots = torch.tensor([4], dtype=torch.int32)
    kv_write_fp8(x, weight, 0.0, cos_sin, pages, slots, layout)
    expected = np.full((2, layout.page_bytes), SENTINEL, dtype=np.uint8)
    codes = np.full(448, 0x78, dtype=np.uint8)  # 256 = 1 / 2^-8
    codes[64:128] = 0
    expected[1, 576 : 576 + 448] = codes
    rope = np.ones(64, dtype=np.float32)
    rope[-2:] = -4, 3
    expected[1, 576 + 448 : 1152] = rope.astype(ml_dtypes.bfloat16).view(np.uint8)
    expected[1, 3 * 576 + 8 : 3 * 576 + 16] = [119, 105, 119, 119, 119, 119, 119, 0]  # 105: the floor of 1e-4
    np.testing.assert_array_equal(pages.numpy(), expected)


def test_page_sizes_of_the_facts() -> None:
    assert [kv_layout(entries).page_bytes for entries in (256, 64, 2)] == [149_760, 37_440, 1_728]
    assert key_layout(64).page_bytes == 4_352


def test_slot_minus_one_writes_nothing_and_reads_zeros() -> None:
    layout = kv_layout(2)
    pages = torch.full((1, layout.page_bytes), SENTINEL, dtype=torch.uint8)
    none = torch.full((5,), -1, dtype=torch.int32)
    kv_write_fp8(**kv_tokens(5, 512), pages=pages, slots=none, layout=layout)
    assert bool((pages == SENTINEL).all())
    assert not kv_read_fp8(pages, none, layout).any()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(2, 512)}, TypeError, "x is torch.float32"),
        ({"x": torch.zeros(2, 192, dtype=torch.bfloat16), "weight": torch.ones(192)}, ValueError, "192 wide"),
        ({"weight": torch.ones(511)}, ValueError, r"weight has shape \[511\], expected \[512\]"),
        ({"weight": torch.ones(512).half()}, TypeError, "weight is torch.float16"),
        ({"cos_sin": torch.ones(2, 32)}, ValueError, r"cos_sin has shape \[2, 32\], expected \[2, 64\]"),
        ({"slots": torch.zeros(2, dtype=torch.int64)}, TypeError, "slots is torch.int64"),
        ({"pages": torch.zeros(3, 1168, dtype=torch.uint8)}, ValueError, r"pages has shape \[3, 1168\]"),
        ({"layout": kv_layout(2, 128)}, ValueError, "for entries of this width"),
    ],
)
def test_refusals(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    layout = kv_layout(2)
    slots = torch.tensor([0, 1], dtype=torch.int32)
    arguments = {**kv_tokens(2, 512), "pages": layout.empty_pages(2), "slots": slots, "layout": layout}
    with pytest.raises(error, match=message):
        kv_write_fp8(**{**arguments, **changed})


def test_an_empty_page_is_refused() -> None:
    with pytest.raises(ValueError, match="a page of 0 entries"):
        kv_layout(0)
