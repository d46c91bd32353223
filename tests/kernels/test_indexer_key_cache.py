"""indexer_key_cache, the torch reference: against ml_dtypes and Sylvester's matrix, bytes by hand, refusals."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from v4quant.kernels.indexer_key_cache import indexer_key_read_fp4, indexer_key_write_fp4
from v4quant.kernels.kv_layout import key_layout
from v4quant.kernels.rms_norm import rms_norm_torch
from v4quant.kernels.rope import rope
from v4quant.testing.kv_tokens import SENTINEL, kv_tokens


@pytest.mark.parametrize("dim", [64, 128])
def test_the_round_trip_is_the_simulation(dim: int) -> None:
    token = kv_tokens(37, dim)
    layout = key_layout(8, dim)
    pages = layout.empty_pages(50)
    slots = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:37].to(torch.int32)
    indexer_key_write_fp4(**token, pages=pages, slots=slots, layout=layout)
    y = rope(rms_norm_torch(token["x"], token["weight"], token["eps"])[:, None], token["cos_sin"])[:, 0]
    hadamard = np.ones((1, 1))
    while len(hadamard) < dim:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    turned = torch.from_numpy(y.double().numpy() @ hadamard * dim**-0.5).float().to(torch.bfloat16)
    blocks = turned.double().numpy().reshape(37, -1, 32)
    scale = 2.0 ** np.ceil(np.log2(np.abs(blocks).max(2, keepdims=True) / 6))
    codes = (blocks / scale).astype(np.float32).astype(ml_dtypes.float4_e2m1fn)
    expected = torch.from_numpy(codes.astype(np.float64) * scale).reshape(37, dim).to(torch.bfloat16)
    differ = indexer_key_read_fp4(pages, slots, layout, dim) != expected
    # float64 sums may round to another BF16 number, and that to another code, rarely.
    assert differ.float().mean() < 1e-3


def test_where_bytes_lie() -> None:
    """A row whose transform is one peak: 128 ones, sqrt(128) in the first element."""
    layout = key_layout(3)
    pages = torch.full((2, layout.page_bytes), SENTINEL, dtype=torch.uint8)
    cos_sin = torch.cat([torch.ones(1, 32), torch.zeros(1, 32)], 1)
    x = torch.ones(1, 128, dtype=torch.bfloat16)
    slots = torch.tensor([4], dtype=torch.int32)
    indexer_key_write_fp4(x, torch.ones(128), 0.0, cos_sin, pages, slots, layout)
    expected = np.full((2, 204), SENTINEL, dtype=np.uint8)
    expected[1, 64:128] = 0
    expected[1, 64] = 0x07  # 11.3125 / 2 rounds to 6, in the low nibble
    expected[1, 3 * 64 + 4 : 3 * 64 + 8] = [128, 1, 1, 1]  # 1: the floor of 6 x 2^-126
    np.testing.assert_array_equal(pages.numpy(), expected)


def test_slot_minus_one_writes_nothing_and_reads_zeros() -> None:
    layout = key_layout(2)
    pages = torch.full((1, layout.page_bytes), SENTINEL, dtype=torch.uint8)
    none = torch.full((5,), -1, dtype=torch.int32)
    indexer_key_write_fp4(**kv_tokens(5, 128), pages=pages, slots=none, layout=layout)
    assert bool((pages == SENTINEL).all())
    assert not indexer_key_read_fp4(pages, none, layout).any()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(2, 128)}, TypeError, "x is torch.float32"),
        ({"x": torch.zeros(2, 96, dtype=torch.bfloat16), "weight": torch.ones(96)}, ValueError, "96 wide"),
        ({"weight": torch.ones(128).half()}, TypeError, "weight is torch.float16"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, ValueError, r"slots has shape \[3\]"),
        ({"pages": torch.zeros(3, 584, dtype=torch.uint8)}, ValueError, r"pages has shape \[3, 584\]"),
        ({"layout": key_layout(2, 64)}, ValueError, "for entries of this width"),
    ],
)
def test_refusals(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    layout = key_layout(2)
    slots = torch.tensor([0, 1], dtype=torch.int32)
    arguments = {**kv_tokens(2, 128), "pages": layout.empty_pages(2), "slots": slots, "layout": layout}
    with pytest.raises(error, match=message):
        indexer_key_write_fp4(**{**arguments, **changed})
