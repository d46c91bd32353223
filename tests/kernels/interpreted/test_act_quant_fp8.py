"""act_quant_fp8: bit-equal to the reference on every finite BF16 pattern, odd sizes, zeros and huge ranges."""

import pytest
import torch

from v4quant.kernels.act_quant_fp8 import (
    act_quant_fp8,
    act_quant_fp8_torch,
    act_round_fp8,
    act_round_fp8_torch,
)
from v4quant.testing.tensors import every_finite_bf16


def rows(kind: str) -> torch.Tensor:
    random = torch.Generator().manual_seed(7)
    if kind == "every pattern":
        return every_finite_bf16(columns=512)
    if kind == "zeros":
        return torch.zeros(3, 256, dtype=torch.bfloat16)
    if kind == "one row":
        return torch.randn(1, 128, generator=random).to(torch.bfloat16)
    spread = torch.logspace(-35, 35, 37)[:, None]
    return (torch.randn(37, 384, generator=random) * spread).to(torch.bfloat16)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", ["every pattern", "zeros", "one row", "wide range"])
def test_equals_the_reference(kind: str, block: int) -> None:
    x = rows(kind)
    codes, scale_e8m0 = act_quant_fp8(x, block)
    expected_codes, expected_scale_e8m0 = act_quant_fp8_torch(x, block)
    assert torch.equal(scale_e8m0, expected_scale_e8m0)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # to infinity, as on devices
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", ["every pattern", "zeros", "one row", "wide range"])
def test_round_trip_equals_the_reference(kind: str, block: int) -> None:
    x = rows(kind)
    found = act_round_fp8(x, block)
    assert torch.equal(found.view(torch.int16), act_round_fp8_torch(x, block).view(torch.int16))
