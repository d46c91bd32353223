"""dequantize: bit-equal to the references for every code under every scale, tails, FP32 scales, NaN."""

import pytest
import torch

from v4quant.kernels.dequantize import dequantize_fp4, dequantize_fp4_torch, dequantize_fp8, dequantize_fp8_torch

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # The largest scales carry values beyond float32, of which numpy speaks.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits; any NaN equals any other."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(nan=0.0).view(torch.int16), expected.nan_to_num(nan=0.0).view(torch.int16))


def random_scale(shape: tuple[int, int], is_e8m0: bool, random: torch.Generator) -> torch.Tensor:
    if is_e8m0:
        return torch.randint(0, 256, shape, generator=random).to(torch.uint8)
    scale = torch.randn(shape, generator=random)
    if scale.numel() > 1:
        # A NaN whose bits would be carried into the sign by rounding.
        scale.view(-1)[0] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]
    return scale


def test_every_fp4_code_under_every_scale() -> None:
    packed = torch.tensor([low | (15 - low) << 4 for low in range(16)], dtype=torch.uint8).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].contiguous()
    assert_same_bits(dequantize_fp4(packed, scale), dequantize_fp4_torch(packed, scale))


def test_every_fp8_code_under_every_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128).repeat(1, 256).view(torch.float8_e4m3fn)
    scale = torch.arange(256, dtype=torch.uint8)[None].contiguous()
    assert_same_bits(dequantize_fp8(codes, scale), dequantize_fp8_torch(codes, scale))


@pytest.mark.parametrize("is_e8m0", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(3, 96), (1, 32), (0, 64), (129, 160)])
def test_fp4_sizes(rows: int, columns: int, is_e8m0: bool) -> None:
    random = torch.Generator().manual_seed(rows)
    packed = torch.randint(0, 256, (rows, columns // 2), generator=random).to(torch.uint8)
    scale = random_scale((rows, columns // 32), is_e8m0, random)
    assert_same_bits(dequantize_fp4(packed, scale), dequantize_fp4_torch(packed, scale))


@pytest.mark.parametrize("is_e8m0", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(300, 200), (1, 1), (0, 128), (129, 384)])
def test_fp8_sizes(rows: int, columns: int, is_e8m0: bool) -> None:
    random = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 256, (rows, columns), generator=random).to(torch.uint8).view(torch.float8_e4m3fn)
    scale = random_scale((-(-rows // 128), -(-columns // 128)), is_e8m0, random)
    assert_same_bits(dequantize_fp8(codes, scale), dequantize_fp8_torch(codes, scale))
