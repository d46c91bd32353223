"""rms_norm, the torch reference: against float64, exact cases by hand, and its refusals."""

import pytest
import torch

from v4quant.kernels.rms_norm import rms_norm
from v4quant.testing.closeness import assert_bf16_close


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dims", [1, 100, 512, 7168])
def test_agrees_with_float64(dims: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(dims)
    x = (torch.randn(13, dims, generator=random) * torch.logspace(-6, 6, 13)[:, None]).to(torch.bfloat16)
    weight = torch.randn(dims, generator=random).to(dtype)
    y = x.double()
    expected = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-6) * weight.double()
    assert_bf16_close(rms_norm(x, weight, 1e-6), expected.to(torch.bfloat16))


def test_by_hand() -> None:
    x = torch.tensor([[2.0, -2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    found = rms_norm(x, torch.tensor([1.0, 2.0, 0.5, -1.0]), 0.0 + 2.0**-40)
    assert found.tolist() == [[1.0, -2.0, 0.5, -1.0], [0.0, 0.0, 0.0, -0.0]]


def test_the_weight_is_applied_before_the_one_rounding() -> None:
    """1.00390625 lies between two BF16 numbers: rounding before the weight would lose it."""
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    weight = torch.tensor([1.00390625 * 3, 1.0])
    assert rms_norm(x, weight, 0.0)[0, 0] == torch.tensor(3.01171875).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.zeros(2, 8), torch.ones(8), TypeError, "x is torch.float32"),
        (torch.zeros(2, 8, dtype=torch.bfloat16), torch.ones(8).half(), TypeError, "weight is torch.float16"),
        (torch.zeros(2, 8, dtype=torch.bfloat16), torch.ones(9), ValueError, r"weight has shape \[9\], expected \[8\]"),
        (torch.zeros(2, 0, dtype=torch.bfloat16), torch.ones(0), ValueError, "x has 0 columns"),
        (torch.zeros(1, 40000, dtype=torch.bfloat16), torch.ones(40000), ValueError, "40000 columns"),
    ],
)
def test_refusals(x: torch.Tensor, weight: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rms_norm(x, weight, 1e-6)
