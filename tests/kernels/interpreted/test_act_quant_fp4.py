"""act_quant_fp4 and act_round_fp4: bit-equal to the references on every finite BF16 pattern, odd sizes and zeros."""

import pytest
import torch

from v4quant.kernels.act_quant_fp4 import act_quant_fp4, act_quant_fp4_torch, act_round_fp4, act_round_fp4_torch
from v4quant.testing.tensors import every_finite_bf16

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # The largest BF16 numbers round up beyond float32, of which numpy speaks.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def rows(kind: str) -> torch.Tensor:
    random = torch.Generator().manual_seed(11)
    if kind == "every pattern":
        return every_finite_bf16(columns=512)
    if kind == "zeros":
        return torch.zeros(3, 96, dtype=torch.bfloat16)
    if kind == "one block":
        return torch.randn(1, 32, generator=random).to(torch.bfloat16)
    if kind == "nothing":
        return torch.zeros(0, 128, dtype=torch.bfloat16)
    if kind == "ties":
        return (torch.randint(-24, 25, (33, 128), generator=random) / 4).to(torch.bfloat16)
    return (torch.randn(37, 160, generator=random) * torch.logspace(-38, 35, 37)[:, None]).to(torch.bfloat16)


@pytest.mark.parametrize("kind", ["every pattern", "zeros", "one block", "nothing", "ties", "wide range"])
def test_equals_the_reference(kind: str) -> None:
    x = rows(kind)
    packed, scale_e8m0 = act_quant_fp4(x)
    expected_packed, expected_scale_e8m0 = act_quant_fp4_torch(x)
    assert torch.equal(scale_e8m0, expected_scale_e8m0)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(act_round_fp4(x).view(torch.int16), act_round_fp4_torch(x).view(torch.int16))
