"""act_quant_fp4, the torch reference: against ml_dtypes on every finite BF16 pattern, ties, its refusals."""

import ml_dtypes
import numpy as np
import pytest
import torch

from v4quant.kernels.act_quant_fp4 import act_quant_fp4, act_round_fp4
from v4quant.testing.tensors import every_finite_bf16


def unpack(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def test_agrees_with_ml_dtypes() -> None:
    x = every_finite_bf16(columns=512)
    packed, scale_e8m0 = act_quant_fp4(x)
    values = x.double().numpy().reshape(-1, 32)
    amax = np.maximum(np.abs(values).max(axis=1), 6 * 2.0**-126)
    exponent = np.ceil(np.log2(amax / 6)).astype(int)
    np.testing.assert_array_equal(scale_e8m0.numpy().reshape(-1), exponent + 127)
    scaled = np.clip(values / np.ldexp(1.0, exponent)[:, None], -6, 6)
    expected = scaled.astype(np.float32).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(unpack(packed).numpy().reshape(-1, 32), expected.view(np.uint8) & 15)
    decoded = expected.astype(np.float64) * np.ldexp(1.0, exponent)[:, None]
    decoded[np.abs(decoded) >= 2.0**128] *= np.inf  # the largest BF16 numbers round up beyond BF16
    rounded = act_round_fp4(x).double().numpy().reshape(-1, 32)
    np.testing.assert_array_equal(rounded, decoded)
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(values))


def test_ties_go_to_even_codes_and_zero_keeps_its_sign() -> None:
    x = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.0, -0.25, -0.75] + [0.0] * 21)
    packed, scale_e8m0 = act_quant_fp4(x.to(torch.bfloat16)[None])
    assert scale_e8m0.tolist() == [[127]]
    assert unpack(packed)[0, :12].tolist() == [7, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 0]
    assert packed[0, 0] == 7 and packed[0, 1] == 2 | 2 << 4  # the even column lies in the low nibble


def test_zeros_take_the_floor_of_the_scale() -> None:
    packed, scale_e8m0 = act_quant_fp4(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert scale_e8m0.tolist() == [[1, 1], [1, 1]]
    assert not packed.any()


def test_no_rows() -> None:
    packed, scale_e8m0 = act_quant_fp4(torch.zeros(0, 64, dtype=torch.bfloat16))
    assert packed.shape == (0, 32) and scale_e8m0.shape == (0, 2)


@pytest.mark.parametrize("op", [act_quant_fp4, act_round_fp4])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 128), TypeError, "x is torch.float32, expected torch.bfloat16"),
        (torch.zeros(128, dtype=torch.bfloat16), ValueError, r"x has shape \[128\]"),
        (torch.zeros(2, 48, dtype=torch.bfloat16), ValueError, "48 columns, expected a multiple of 32"),
        (torch.zeros(128, 32, dtype=torch.bfloat16).T, ValueError, "x is not contiguous"),
    ],
)
def test_refusals(op: object, x: torch.Tensor, error: type[Exception], message: str) -> None:
    assert callable(op)
    with pytest.raises(error, match=message):
        op(x)
