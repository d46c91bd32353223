"""rms_norm: equal to the reference but for the order of FP32 sums; odd widths, one row, none, zeros."""

import pytest
import torch

from v4quant.kernels._rms_norm_triton import RmsNormLaunch, plan
from v4quant.kernels.rms_norm import rms_norm, rms_norm_torch
from v4quant.testing.closeness import assert_bf16_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "dims"), [(9, 100), (1, 1), (0, 512), (5, 128), (7, 1536), (3, 7168)])
def test_equals_the_reference(rows: int, dims: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(dims)
    # NaN behind each tensor: reading beyond the last row or column fails.
    x = torch.full((rows + 1, dims), torch.nan, dtype=torch.bfloat16)
    x[:rows] = (torch.randn(rows, dims, generator=random) * torch.logspace(-5, 5, rows)[:, None]).to(torch.bfloat16)
    weight = torch.full((dims + 64,), torch.nan, dtype=dtype)
    weight[:dims] = torch.randn(dims, generator=random)
    arguments = (x[:rows], weight[:dims], 1e-6)
    assert_bf16_close(rms_norm(*arguments), rms_norm_torch(*arguments))


def test_zeros_stay_zeros() -> None:
    assert not rms_norm(torch.zeros(2, 512, dtype=torch.bfloat16), torch.ones(512), 1e-6).any()


def test_plan() -> None:
    assert plan(128) == RmsNormLaunch(block=256, num_warps=1)
    assert plan(1536) == RmsNormLaunch(block=2048, num_warps=8)
    assert plan(7168) == RmsNormLaunch(block=8192, num_warps=8)
    assert plan(32768) == RmsNormLaunch(block=32768, num_warps=16)
