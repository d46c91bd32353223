"""fp8_gemm: both paths and all tiles against the reference, odd sizes, float32 scales, poison, every weight byte."""

import pytest
import torch

from v4quant.kernels._fp8_gemm_triton import launch
from v4quant.kernels._gemm_launch import GemmLaunch
from v4quant.kernels.fp8_gemm import fp8_gemm, fp8_gemm_torch
from v4quant.testing.closeness import assert_bf16_close
from v4quant.testing.quantized import activations, fp8_weight

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FINITE = [byte for byte in range(256) if byte & 0x7F != 0x7F]


@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "columns", "depth"), [(1, 128, 128), (37, 200, 384), (0, 128, 128), (150, 65, 256), (5, 1, 256)]
)
def test_close_to_the_reference(tokens: int, columns: int, depth: int, scale_dtype: torch.dtype) -> None:
    arguments = (*activations(tokens, depth), *fp8_weight((columns, depth), scale_dtype))
    assert_bf16_close(fp8_gemm(*arguments), fp8_gemm_torch(*arguments))


@pytest.mark.parametrize(
    ("path", "block_tokens", "block_columns", "splits"),
    [
        ("fp8", 16, 64, 1),
        ("fp8", 256, 64, 1),
        ("fp16", 64, 128, 1),
        ("scaled", 16, 128, 1),
        ("scaled", 128, 128, 1),
        # Of 5 steps along K: 3 and 2; or 2, 2, 1 and none.
        ("fp8", 64, 64, 2),
        ("fp16", 64, 128, 4),
        ("scaled", 64, 128, 4),
    ],
)
def test_every_launch(path: str, block_tokens: int, block_columns: int, splits: int) -> None:
    arguments = (*activations(40, 640), *fp8_weight((200, 640), torch.uint8))
    choice = GemmLaunch(path, block_tokens, block_columns, 128, 4, 1, splits)
    assert_bf16_close(launch(*arguments, choice), fp8_gemm_torch(*arguments))


def test_more_tiles_of_tokens_than_work_side_by_side() -> None:
    arguments = (*activations(300, 128), *fp8_weight((200, 128), torch.uint8))
    choice = GemmLaunch("fp8", 16, 128, 128, 4, 1)
    assert_bf16_close(launch(*arguments, choice), fp8_gemm_torch(*arguments))


@pytest.mark.parametrize("path", ["fp8", "fp16", "scaled"])
def test_every_byte_exactly(path: str) -> None:
    # Rows with one code each, times the unit matrix: the output is the weight, whose values BF16 holds.
    eye = torch.eye(128).to(torch.float8_e4m3fn)
    codes = torch.tensor(FINITE, dtype=torch.uint8)[:, None].repeat(1, 128).view(torch.float8_e4m3fn)  # [254, 128]
    ones = torch.full((128, 1), 127, dtype=torch.uint8)
    choice = GemmLaunch(path, 64, 128, 128, 4, 1)
    as_weight = launch(eye, ones, codes, ones[:2], choice)
    assert torch.equal(as_weight, codes.float().T.to(torch.bfloat16))
    as_activations = launch(codes, torch.full((254, 1), 127, dtype=torch.uint8), eye, ones[:1], choice)
    assert torch.equal(as_activations, codes.float().to(torch.bfloat16))


def test_scales_at_the_ends_of_their_range() -> None:
    codes = torch.full((1, 128), 1.0).to(torch.float8_e4m3fn)
    for x_byte, w_byte in ((0, 130), (0, 254), (1, 127), (238, 10)):
        x_scale = torch.tensor([[x_byte]], dtype=torch.uint8)
        w_scale = torch.tensor([[w_byte]], dtype=torch.uint8)
        found = fp8_gemm(codes, x_scale, codes, w_scale)
        assert found.item() == 128 * 2.0 ** (x_byte + w_byte - 254)


def test_rows_do_not_meet() -> None:
    codes, scale_e8m0 = activations(20, 256)
    weight, weight_scale = fp8_weight((70, 256), torch.uint8)
    expected = fp8_gemm_torch(codes, scale_e8m0, weight, weight_scale)
    codes.view(torch.uint8)[7] = 0x7F
    weight.view(torch.uint8)[33] = 0x7F
    found = fp8_gemm(codes, scale_e8m0, weight, weight_scale)
    others = [row for row in range(20) if row != 7]
    columns = [column for column in range(70) if column != 33]
    assert_bf16_close(found[others][:, columns], expected[others][:, columns])
