"""act_quant_fp8, the torch reference: against ml_dtypes on every finite BF16 pattern, and its refusals."""

import ml_dtypes
import numpy as np
import pytest
import torch

from v4quant.kernels.act_quant_fp8 import act_quant_fp8, act_round_fp8
from v4quant.testing.tensors import every_finite_bf16


@pytest.mark.parametrize("block", [64, 128])
def test_agrees_with_ml_dtypes(block: int) -> None:
    x = every_finite_bf16(columns=512)
    codes, scale_e8m0 = act_quant_fp8(x, block)
    values = x.double().numpy().reshape(-1, block)
    amax = np.maximum(np.abs(values).max(axis=1), 1e-4)
    exponent = np.ceil(np.log2(amax / 448)).astype(int)
    np.testing.assert_array_equal(scale_e8m0.numpy().reshape(-1), exponent + 127)
    scaled = np.clip(values / np.ldexp(1.0, exponent)[:, None], -448, 448)
    expected = scaled.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy().reshape(-1, block), expected)
    decoded = expected.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.ldexp(1.0, exponent)[:, None]
    decoded[np.abs(decoded) >= 2.0**128] *= np.inf  # the largest BF16 numbers round up beyond BF16
    np.testing.assert_array_equal(act_round_fp8(x, block).double().numpy().reshape(-1, block), decoded)


@pytest.mark.parametrize(
    ("x", "block", "error", "message"),
    [
        (torch.zeros(2, 128), 128, TypeError, "x is torch.float32, expected torch.bfloat16"),
        (torch.zeros(128, dtype=torch.bfloat16), 128, ValueError, r"x has shape \[128\]"),
        (torch.zeros(2, 192, dtype=torch.bfloat16), 128, ValueError, "divides 192 columns"),
        (torch.zeros(2, 128, dtype=torch.bfloat16), 32, ValueError, r"expected one of \(64, 128\)"),
        (torch.zeros(128, 2, dtype=torch.bfloat16).T, 64, ValueError, "x is not contiguous"),
    ],
)
def test_refusals(x: torch.Tensor, block: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act_quant_fp8(x, block)
