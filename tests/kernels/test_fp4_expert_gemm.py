"""fp4_expert_gemm, the torch reference: against float64 sums token by token, the places of its roundings, refusals."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from v4quant.kernels.expert_order import sort_by_expert
from v4quant.kernels.fp4_expert_gemm import ExpertWeights, fp4_expert_gemm
from v4quant.testing.quantized import activations, experts, picks

Array = npt.NDArray[np.float64]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def bf16(x: Array) -> Array:
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def quantised(x: Array) -> Array:
    """A row, rounded to E4M3 in blocks of 128."""
    blocks = x.reshape(-1, 128)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(blocks).max(1, keepdims=True), 1e-4) / 448))
    codes = (blocks / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return np.asarray(codes.astype(np.float64) * scale).reshape(-1)


def matrix(weight: torch.Tensor, scale: torch.Tensor) -> Array:
    """One expert's weight, decoded."""
    factors = scale.numpy() if scale.dtype == torch.float32 else np.ldexp(1.0, scale.numpy().astype(int) - 127)
    if weight.dtype == torch.uint8:
        byte = weight.numpy()
        codes = E2M1[np.stack([byte & 15, byte >> 4], -1).reshape(len(byte), -1)]
        return np.asarray(codes * factors.repeat(32, 1))
    codes = weight.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.asarray(codes * factors.astype(np.float64).repeat(128, 0).repeat(128, 1))


def float64_layer(
    codes: torch.Tensor,
    scale: torch.Tensor,
    indices: torch.Tensor,
    router: torch.Tensor,
    weights: ExpertWeights,
    limit: float,
    weight_last: bool = False,
) -> Array:
    out = np.zeros((codes.shape[0], weights.hidden))
    x = codes.double().numpy() * np.ldexp(1.0, scale.numpy().astype(int) - 127).repeat(128, 1)
    for token, row in enumerate(indices.tolist()):
        for slot, expert in enumerate(row):
            if expert < 0:
                continue
            gate = bf16(matrix(weights.w1[expert], weights.w1_scale[expert]) @ x[token])
            up = bf16(matrix(weights.w3[expert], weights.w3_scale[expert]) @ x[token])
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            factor = float(router[token, slot])
            h = gate / (1 + np.exp(-gate)) * up * (1 if weight_last else factor)
            y = bf16(matrix(weights.w2[expert], weights.w2_scale[expert]) @ quantised(bf16(h)))
            out[token] += y * (factor if weight_last else 1)
    return out


def error(found: torch.Tensor, expected: Array) -> float:
    return float(np.linalg.norm(found.double().numpy() - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", ["fp4", "fp8", "fp8 float32 scales"])
def test_agrees_with_float64(kind: str) -> None:
    weights = ExpertWeights(*experts(kind, 5, 256, 384))
    codes, scale = activations(13, 384)
    indices, router = picks(13, 3, 5)
    indices[4, 1] = indices[9] = -1
    found = fp4_expert_gemm(codes, scale, sort_by_expert(indices, router, 5), weights, 10.0)
    expected = float64_layer(codes, scale, indices, router, weights, 10.0)
    # A sum that rounds the other way changes one E4M3 code of h at times, never more than a few of thousands.
    assert error(found, expected) < 5e-4
    assert np.mean(np.abs(found.double().numpy() - expected) <= 1e-5 * np.abs(expected)) > 0.9
    assert bool((found[9] == 0).all())
    # The same figures tell semantics apart that differ by one rounding or one clamp.
    assert error(found, float64_layer(codes, scale, indices, router, weights, 10.0, weight_last=True)) > 5e-3
    assert error(found, float64_layer(codes, scale, indices, router, weights, np.inf)) > 5e-3


def test_no_token_and_no_expert() -> None:
    weights = ExpertWeights(*experts("fp4", 2, 128, 128))
    codes, scale = activations(0, 128)
    order = sort_by_expert(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 2)
    assert fp4_expert_gemm(codes, scale, order, weights, 10.0).shape == (0, 128)
    codes, scale = activations(3, 128)
    order = sort_by_expert(torch.full((3, 2), -1), torch.ones(3, 2), 2)
    assert torch.equal(fp4_expert_gemm(codes, scale, order, weights, 10.0), torch.zeros(3, 128))


FP4 = ExpertWeights(*experts("fp4", 3, 128, 256))
FP8 = ExpertWeights(*experts("fp8", 3, 128, 256))


@pytest.mark.parametrize(
    ("change", "raised", "message"),
    [
        ({"w2": FP8.w2}, TypeError, "w2 is torch.float8_e4m3fn, expected torch.uint8"),
        ({"w1": FP4.w1.float()}, TypeError, "w1 is torch.float32"),
        ({"w1": FP4.w1[0]}, ValueError, r"w1 has shape \[128, 128\]"),
        ({"w3": FP4.w3[:2]}, ValueError, r"w3 has shape \[2, 128, 128\], expected \[3, 128, 128\]"),
        ({"w1": FP4.w1[..., :96].contiguous()}, ValueError, "experts are 128 x 192, expected multiples of 128"),
        ({"w2_scale": FP8.w2_scale}, ValueError, "w2_scale has shape"),
        ({"w1_scale": FP4.w1_scale.float()}, TypeError, "w1_scale is torch.float32"),
    ],
)
def test_experts_must_fit_each_other(change: dict[str, torch.Tensor], raised: type[Exception], message: str) -> None:
    with pytest.raises(raised, match=message):
        replace(FP4, **change)


def test_refusals() -> None:
    codes, scale = activations(4, 256)
    order = sort_by_expert(*picks(4, 1, 3), 3)
    with pytest.raises(TypeError, match=r"codes is torch\.float32"):
        fp4_expert_gemm(codes.float(), scale, order, FP4, 10.0)
    with pytest.raises(ValueError, match="codes has shape"):
        fp4_expert_gemm(codes[:, :128].contiguous(), scale, order, FP4, 10.0)
    with pytest.raises(ValueError, match="scale_e8m0 has shape"):
        fp4_expert_gemm(codes, scale[:3], order, FP4, 10.0)
    with pytest.raises(ValueError, match="order is of 5 tokens and 3 experts, expected 4 and 3"):
        fp4_expert_gemm(codes, scale, sort_by_expert(*picks(5, 1, 3), 3), FP4, 10.0)
