"""All routed experts of a layer: grouped matrix products that decode FP4 weights as they multiply.

For each token t and each expert e that the router picked for it with weight r:

    gate = BF16(x[t] w1[e]^T)    up = BF16(x[t] w3[e]^T)                       E4M3 x E2M1, FP32 sums
    h    = BF16(silu(min(gate, L)) * clamp(up, -L, L) * r)                     FP32
    y    = BF16(quantise(h) w2[e]^T)                                           E4M3 blocks of 128, as act_quant_fp8
    out[t] = sum of y over the token's experts, in ascending order             FP32

T tokens, E experts, D hidden size, I expert width, L the SwiGLU limit (10), A token-expert pairs, sorted by expert.
Source: `Expert` and `MoE` of DeepSeek's released inference code: the router weight goes in before the second quantiser,
and experts are added in their order. Products are exact (E2M1 x 2^k and E4M3 x 2^k are BF16 numbers), so
implementations differ by the order of FP32 sums alone.

The kernels run the layer in three launches, whatever E is: gate and up with SwiGLU, router weight and quantiser in one;
down; the sum. Nothing is added atomically, so equal inputs give equal bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from v4quant.kernels._backend import require, use_triton
from v4quant.kernels._gemm_launch import SCALE_BLOCK
from v4quant.kernels.act_quant_fp8 import act_quant_fp8_torch
from v4quant.kernels.dequantize import FP4_BLOCK, dequantize_fp4_torch, scale_values
from v4quant.kernels.expert_order import ExpertOrder
from v4quant.kernels.fp8_gemm import fp8_gemm_torch, require_weight_scale


@dataclass(frozen=True)
class ExpertWeights:
    """The routed experts of one layer, one below the other, in the form that they are stored in.

    Attributes:
        w1, w3: gate and up. FP4: uint8 [E, I, D/2], two E2M1 codes a byte, the even column in the low nibble. FP8:
            float8_e4m3fn [E, I, D].
        w2: down, FP4 uint8 [E, D, I/2] or FP8 float8_e4m3fn [E, D, I].
        w1_scale, w3_scale: FP4: uint8 (E8M0) [E, I, D/32]. FP8: uint8 or float32 [E, I/128, D/128].
        w2_scale: FP4 uint8 [E, D, I/32], FP8 uint8 or float32 [E, D/128, I/128].
    """

    w1: torch.Tensor
    w1_scale: torch.Tensor
    w3: torch.Tensor
    w3_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor

    def __post_init__(self) -> None:
        """Check that the six tensors fit each other.

        Raises:
            TypeError: if a dtype is none of those above; experts of mixed formats have one that differs.
            ValueError: if a shape does not fit, or a tensor is not contiguous.
        """
        if self.w1.dtype not in (torch.uint8, torch.float8_e4m3fn):
            raise TypeError(f"w1 is {self.w1.dtype}, expected torch.uint8 (packed FP4) or torch.float8_e4m3fn")
        if self.w1.dim() != 3:
            raise ValueError(f"w1 has shape {list(self.w1.shape)}, expected [experts, width, hidden size]")
        if self.width % SCALE_BLOCK or self.hidden % SCALE_BLOCK:
            raise ValueError(f"experts are {self.width} x {self.hidden}, expected multiples of {SCALE_BLOCK}")
        for name, rows, columns in (
            ("w1", self.width, self.hidden),
            ("w3", self.width, self.hidden),
            ("w2", self.hidden, self.width),
        ):
            weight, scale = getattr(self, name), getattr(self, f"{name}_scale")
            if self.is_fp4:
                require(name, weight, torch.uint8, (self.experts, rows, columns // 2))
                require(f"{name}_scale", scale, torch.uint8, (self.experts, rows, columns // FP4_BLOCK))
            else:
                blocks = (self.experts, rows // SCALE_BLOCK, columns // SCALE_BLOCK)
                require(name, weight, torch.float8_e4m3fn, (self.experts, rows, columns))
                require_weight_scale(f"{name}_scale", scale, blocks)

    @property
    def is_fp4(self) -> bool:
        """Packed E2M1; else E4M3."""
        return self.w1.dtype == torch.uint8

    @property
    def experts(self) -> int:
        """E."""
        return self.w1.shape[0]

    @property
    def width(self) -> int:
        """I."""
        return self.w1.shape[1]

    @property
    def hidden(self) -> int:
        """D."""
        return self.w1.shape[2] * (2 if self.is_fp4 else 1)

    @property
    def matrices(self) -> tuple[torch.Tensor, ...]:
        """All six, codes as bytes: w1, its scale, w3, its scale, w2, its scale."""
        first, second, third = (weight.view(torch.uint8) for weight in (self.w1, self.w3, self.w2))
        return (first, self.w1_scale, second, self.w3_scale, third, self.w2_scale)


def fp4_expert_gemm_torch(
    codes: torch.Tensor, scale_e8m0: torch.Tensor, order: ExpertOrder, weights: ExpertWeights, limit: float
) -> torch.Tensor:
    """Reference for fp4_expert_gemm: same arguments, equal but for the order of FP32 sums, any device."""
    linear: Callable[..., torch.Tensor] = _fp4_linear if weights.is_fp4 else fp8_gemm_torch
    out = torch.zeros(codes.shape[0], weights.hidden, device=codes.device)
    offset = order.offset.tolist()
    for expert in range(weights.experts):
        rows = slice(offset[expert], offset[expert + 1])
        token = order.token[rows]
        if len(token) == 0:
            continue
        x = (codes.view(torch.uint8)[token].view(codes.dtype), scale_e8m0[token])
        gate = linear(*x, weights.w1[expert], weights.w1_scale[expert]).float()
        up = linear(*x, weights.w3[expert], weights.w3_scale[expert]).float()
        h = torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * order.weight[rows, None]
        y = linear(
            *act_quant_fp8_torch(h.to(torch.bfloat16), SCALE_BLOCK), weights.w2[expert], weights.w2_scale[expert]
        )
        out.index_add_(0, token, y.float())
    return out


def _fp4_linear(
    codes: torch.Tensor, scale_e8m0: torch.Tensor, packed: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """x w^T with both sides decoded, which is exact; FP32 sums, bfloat16 [A, N]."""
    wide = scale_values(scale_e8m0).repeat_interleave(SCALE_BLOCK, 1)  # [A, K]
    return ((codes.float() * wide) @ dequantize_fp4_torch(packed, weight_scale).float().T).to(torch.bfloat16)


def fp4_expert_gemm(
    codes: torch.Tensor, scale_e8m0: torch.Tensor, order: ExpertOrder, weights: ExpertWeights, limit: float
) -> torch.Tensor:
    """Run the routed experts of a layer on quantised activations.

    Args:
        codes: float8_e4m3fn [T, D], as act_quant_fp8 returns them for blocks of 128.
        scale_e8m0: uint8 [T, D/128], their scales.
        order: the router's picks, from sort_by_expert.
        weights: the experts, FP4 or FP8.
        limit: swiglu_limit of the config, 10 in every release.

    Returns:
        float32 [T, D], the routed experts' sum for each token; the shared expert is not in it.

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    require("codes", codes, torch.float8_e4m3fn, (None, weights.hidden))
    require("scale_e8m0", scale_e8m0, torch.uint8, (codes.shape[0], weights.hidden // SCALE_BLOCK))
    if order.experts != weights.experts or order.row.shape[0] != codes.shape[0]:
        raise ValueError(
            f"order is of {order.row.shape[0]} tokens and {order.experts} experts, "
            f"expected {codes.shape[0]} and {weights.experts}"
        )
    if not use_triton(codes):
        return fp4_expert_gemm_torch(codes, scale_e8m0, order, weights, limit)
    from v4quant.kernels._fp4_expert_gemm_triton import launch

    return launch(codes, scale_e8m0, order, weights.matrices, limit)
