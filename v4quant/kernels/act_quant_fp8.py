"""Dynamic activation quantisation to E4M3 with a power-of-two scale for each block of a row.

    amax  = max(|x| over the block, 1e-4)
    scale = 2 ** ceil(log2(amax / 448))
    code  = E4M3 of clamp(x / scale, -448, 448), nearest even

M rows, K columns, B the block: 128 before every FP8 and FP4 linear, 64 for the non-RoPE part of KV entries. Source:
`act_quant_kernel` of DeepSeek's released inference code. The logarithm is taken on the bits of amax x fp32(1 / 448),
as there; the division is exact, because the scale is a power of two.
"""

import torch

from v4quant.kernels._backend import require, use_triton

FLOOR = 1e-4
E4M3_MAX = 448.0
BLOCKS = (64, 128)


def act_quant_fp8_torch(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference for act_quant_fp8: same arguments, same bits, any device."""
    rows, columns = x.shape
    blocks = x.float().reshape(rows, columns // block, block)  # [M, K/B, B]
    amax = blocks.abs().amax(-1).clamp(min=FLOOR)  # [M, K/B]
    scale_e8m0 = power_of_two_byte(amax, 1 / E4M3_MAX)  # [M, K/B]
    scale = (scale_e8m0.to(torch.int32) << 23).view(torch.float32)
    codes = (blocks / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.reshape(rows, columns), scale_e8m0


def power_of_two_byte(amax: torch.Tensor, inverse: float) -> torch.Tensor:
    """E8M0 byte of 2^ceil(log2(amax x inverse)), uint8; amax is positive, float32, any shape."""
    bits = (amax * torch.tensor(inverse, dtype=torch.float32)).view(torch.int32)
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)).to(torch.uint8)


def act_round_fp8_torch(x: torch.Tensor, block: int) -> torch.Tensor:
    """Reference for act_round_fp8: same arguments, same bits, any device."""
    codes, scale_e8m0 = act_quant_fp8_torch(x, block)
    scale = (scale_e8m0.to(torch.int32) << 23).view(torch.float32)  # byte 105 at least: no subnormals
    return (codes.float().reshape(*scale.shape, block) * scale[..., None]).reshape(x.shape).to(torch.bfloat16)


def act_quant_fp8(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations.

    Args:
        x: bfloat16 [M, K], finite, contiguous; K a multiple of the block.
        block: columns that share a scale, 64 or 128.

    Returns:
        codes float8_e4m3fn [M, K], and scale_e8m0 uint8 [M, K/B].

    Raises:
        TypeError: if x is not bfloat16.
        ValueError: if a shape or the block does not fit.
    """
    _check(x, block)
    if not use_triton(x):
        return act_quant_fp8_torch(x, block)
    from v4quant.kernels._act_quant_fp8_triton import launch

    return launch(x, block)


def act_round_fp8(x: torch.Tensor, block: int) -> torch.Tensor:
    """Round activations to what act_quant_fp8 would store and decode again, in one pass: bfloat16 [M, K], exact.

    Args:
        x: as for act_quant_fp8.
        block: as for act_quant_fp8.

    Raises:
        TypeError, ValueError: as act_quant_fp8.
    """
    _check(x, block)
    if not use_triton(x):
        return act_round_fp8_torch(x, block)
    from v4quant.kernels._act_quant_fp8_triton import launch_round

    return launch_round(x, block)


def _check(x: torch.Tensor, block: int) -> None:
    require("x", x, torch.bfloat16, (None, None))
    if block not in BLOCKS or x.shape[1] % block:
        raise ValueError(f"block is {block}, expected one of {BLOCKS} that divides {x.shape[1]} columns")
