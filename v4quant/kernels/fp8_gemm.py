"""Matrix product of E4M3 activations and E4M3 weights, as every FP8 linear of the model.

    partial[j] = sum over the 128 columns k of block j: x[m, k] w[n, k]        exact products, FP32 sum
    out[m, n]  = BF16 of the FP32 sum over j of  partial[j] * (x_scale[m, j] * w_scale[n / 128, j])

M tokens, N outputs, K inputs, a multiple of 128. Source: `fp8_gemm_kernel` of DeepSeek's released inference code.
Products of two E4M3 numbers are exact in FP32, so implementations differ by the order of sums alone; but Hopper's FP8
matrix instruction keeps only about 14 bits of a sum, which is why it is given 128 columns at a time, as there.
Blackwell's block-scaled instruction applies E8M0 scales itself and sums everything in FP32; it needs one accumulator
where the others need two, and so larger tiles. Few tokens make few tiles, and several programs then share K: FP32 sums
that are added in order, so the same call gives the same bits.
"""

import torch

from v4quant.kernels._backend import require, use_triton
from v4quant.kernels._gemm_launch import SCALE_BLOCK
from v4quant.kernels.dequantize import scale_values


def fp8_gemm_torch(
    codes: torch.Tensor, scale_e8m0: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """Reference for fp8_gemm: same arguments, equal but for the order of FP32 sums, any device."""
    columns = weight.shape[0]
    x_scale = scale_values(scale_e8m0)  # [M, K/128]
    w_scale = scale_values(weight_scale).repeat_interleave(SCALE_BLOCK, 0)[:columns]  # [N, K/128]
    out = torch.zeros(codes.shape[0], columns, device=codes.device)
    for block in range(codes.shape[1] // SCALE_BLOCK):
        inside = slice(block * SCALE_BLOCK, (block + 1) * SCALE_BLOCK)
        partial = codes[:, inside].float() @ weight[:, inside].float().T  # [M, N]
        out += partial * (x_scale[:, block, None] * w_scale[:, block])
    return out.to(torch.bfloat16)


def fp8_gemm(
    codes: torch.Tensor, scale_e8m0: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """Multiply quantised activations by an FP8 weight.

    Args:
        codes: float8_e4m3fn [M, K], as act_quant_fp8 returns them for blocks of 128.
        scale_e8m0: uint8 [M, K/128], their scales.
        weight: float8_e4m3fn [N, K].
        weight_scale: uint8 (E8M0) or float32 [ceil(N/128), K/128].

    Returns:
        bfloat16 [M, N].

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    require("codes", codes, torch.float8_e4m3fn, (None, None))
    tokens, depth = codes.shape
    if depth % SCALE_BLOCK:
        raise ValueError(f"codes have {depth} columns, expected a multiple of {SCALE_BLOCK}")
    require("scale_e8m0", scale_e8m0, torch.uint8, (tokens, depth // SCALE_BLOCK))
    require("weight", weight, torch.float8_e4m3fn, (None, depth))
    require_weight_scale("weight_scale", weight_scale, (-(-weight.shape[0] // SCALE_BLOCK), depth // SCALE_BLOCK))
    if not use_triton(codes):
        return fp8_gemm_torch(codes, scale_e8m0, weight, weight_scale)
    from v4quant.kernels._fp8_gemm_triton import launch

    return launch(codes, scale_e8m0, weight, weight_scale)


def require_weight_scale(name: str, scale: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Check the scales of an FP8 weight: E8M0 bytes, or float32 as in the Base releases."""
    if scale.dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"{name} is {scale.dtype}, expected torch.uint8 (E8M0 bytes) or torch.float32")
    require(name, scale, scale.dtype, shape)
