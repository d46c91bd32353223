"""dequantize, the torch references: every code under every scale against ml_dtypes; tails, FP32 scales, refusals."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from v4quant.kernels.dequantize import dequantize_fp4, dequantize_fp8

EVERY_SCALE = torch.arange(256, dtype=torch.uint8)


def bf16_of(values: Any) -> Any:
    """What float64 values are in BF16, NaN kept."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(ml_dtypes.bfloat16).astype(np.float64)


def scales(count: int) -> Any:
    """E8M0 bytes 0 .. 255 as float64."""
    return np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan)[:count]


def test_every_fp4_code_under_every_scale() -> None:
    packed = torch.tensor([low | (15 - low) << 4 for low in range(16)], dtype=torch.uint8).repeat(256, 1)
    found = dequantize_fp4(packed, EVERY_SCALE[:, None].contiguous())
    codes = np.array([[low, 15 - low] for low in range(16)], dtype=np.uint8).reshape(-1)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    expected = bf16_of(values * scales(256)[:, None])
    np.testing.assert_array_equal(found.double().numpy(), expected)
    np.testing.assert_array_equal(np.signbit(found[:255].double().numpy()), np.signbit(expected[:255]))


def test_every_fp8_code_under_every_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(128, 1).reshape(256, 128)  # two rows hold every code
    found = torch.stack(
        [dequantize_fp8(codes[:2].view(torch.float8_e4m3fn), scale[None, None]) for scale in EVERY_SCALE]
    )
    values = codes[:2].numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(found.double().numpy(), bf16_of(values * scales(256)[:, None, None]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(300, 200), (128, 128), (1, 1), (129, 384), (0, 128)])
def test_fp8_blocks_and_tails(rows: int, columns: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 127, (rows, columns), generator=random).to(torch.uint8).view(torch.float8_e4m3fn)
    shape = (-(-rows // 128), -(-columns // 128))
    scale = torch.randint(100, 130, shape, generator=random).to(dtype)
    if dtype == torch.float32:
        scale = torch.randn(shape, generator=random)
    values = scale.numpy() if dtype == torch.float32 else np.exp2(scale.numpy().astype(np.float32) - 127)
    wide = values.repeat(128, 0).repeat(128, 1)[:rows, :columns]
    expected = (codes.float().numpy() * wide).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(dequantize_fp8(codes, scale).float().numpy(), expected.astype(np.float32))


def test_fp4_with_float32_scales() -> None:
    random = torch.Generator().manual_seed(2)
    packed = torch.randint(0, 256, (130, 48), generator=random).to(torch.uint8)
    scale = torch.randn(130, 3, generator=random)
    codes = np.stack([packed.numpy() & 15, packed.numpy() >> 4], -1).reshape(130, 96)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale.numpy().repeat(32, 1)
    expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(dequantize_fp4(packed, scale).float().numpy(), expected)


@pytest.mark.parametrize(
    ("packed", "scale", "error", "message"),
    [
        (torch.zeros(2, 32).char(), torch.zeros(2, 2).byte(), TypeError, "packed is torch.int8"),
        (torch.zeros(2, 24).byte(), torch.zeros(2, 1).byte(), ValueError, "24 columns, expected a multiple of 16"),
        (torch.zeros(2, 32).byte(), torch.zeros(2, 1).byte(), ValueError, r"scale has shape \[2, 1\]"),
        (torch.zeros(2, 32).byte(), torch.zeros(2, 2).bfloat16(), TypeError, "scale is torch.bfloat16"),
    ],
)
def test_fp4_refuses(packed: torch.Tensor, scale: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dequantize_fp4(packed, scale)


def test_fp8_refuses() -> None:
    codes = torch.zeros(129, 128, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"codes is torch.uint8, expected torch.float8_e4m3fn"):
        dequantize_fp8(codes, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"scale has shape \[1, 1\], expected \[2, 1\]"):
        dequantize_fp8(codes.view(torch.float8_e4m3fn), torch.zeros(1, 1))
