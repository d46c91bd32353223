"""fp8_gemm, the torch reference: against float64 sums of what ml_dtypes decodes, and its refusals."""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from v4quant.kernels.fp8_gemm import fp8_gemm
from v4quant.testing.closeness import assert_bf16_close
from v4quant.testing.quantized import activations, fp8_weight


def decoded(codes: torch.Tensor) -> npt.NDArray[np.float64]:
    return np.asarray(codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn), np.float64)


def scales(scale: torch.Tensor) -> npt.NDArray[np.float64]:
    if scale.dtype == torch.uint8:
        return np.asarray(np.ldexp(1.0, scale.numpy().astype(int) - 127))
    return np.asarray(scale.double().numpy())


@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("tokens", "columns", "depth"), [(1, 128, 128), (37, 200, 384), (0, 128, 128), (5, 1, 256)])
def test_agrees_with_float64(tokens: int, columns: int, depth: int, scale_dtype: torch.dtype) -> None:
    codes, scale_e8m0 = activations(tokens, depth)
    weight, weight_scale = fp8_weight((columns, depth), scale_dtype)
    x = decoded(codes) * scales(scale_e8m0).repeat(128, 1)
    w = decoded(weight) * scales(weight_scale).repeat(128, 0)[:columns].repeat(128, 1)
    found = fp8_gemm(codes, scale_e8m0, weight, weight_scale)
    assert_bf16_close(found, torch.from_numpy(x @ w.T).to(torch.bfloat16))


CODES, SCALE = activations(2, 256)
WEIGHT, WEIGHT_SCALE = fp8_weight((200, 256), torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((CODES.float(), SCALE, WEIGHT, WEIGHT_SCALE), TypeError, "codes is torch.float32"),
        ((CODES[:, :192].contiguous(), SCALE, WEIGHT, WEIGHT_SCALE), ValueError, "192 columns, expected a multiple"),
        ((CODES, SCALE[:, :1], WEIGHT, WEIGHT_SCALE), ValueError, "scale_e8m0 has shape"),
        ((CODES, SCALE, WEIGHT[:, :128].contiguous(), WEIGHT_SCALE), ValueError, "weight has shape"),
        ((CODES, SCALE, WEIGHT.T, WEIGHT_SCALE), ValueError, "weight has shape"),
        ((CODES, SCALE, WEIGHT, WEIGHT_SCALE[:1]), ValueError, r"weight_scale has shape \[1, 2\], expected \[2, 2\]"),
        ((CODES, SCALE, WEIGHT, WEIGHT_SCALE.bfloat16()), TypeError, "weight_scale is torch.bfloat16"),
    ],
)
def test_refusals(arguments: tuple[torch.Tensor, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp8_gemm(*arguments)
