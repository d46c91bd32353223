"""Dynamic activation quantisation to E2M1 with a power-of-two scale for each 32 columns, as the indexer uses it.

    amax  = max(|x| over the block, 6 * 2 ** -126)
    scale = 2 ** ceil(log2(amax / 6))
    code  = E2M1 of clamp(x / scale, -6, 6), nearest even, sign of zero kept

M rows, K columns, a block is 32 columns; two codes a byte, the even column in the low nibble. Source:
`fp4_act_quant_kernel` of DeepSeek's released inference code. The floor makes scale byte 1 the smallest; the logarithm
is taken on the bits of amax x fp32(1 / 6), as there.
"""

import torch

from v4quant.kernels._backend import require, use_triton
from v4quant.kernels.act_quant_fp8 import power_of_two_byte

BLOCK = 32
E2M1_MAX = 6.0
FLOOR = 6 * 2.0**-126
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def act_quant_fp4_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference for act_quant_fp4: same arguments, same bits, any device."""
    codes, scale_e8m0 = _codes(x)
    pairs = codes.reshape(x.shape[0], x.shape[1] // 2, 2)  # [M, K/2, 2]
    return pairs[..., 0] | (pairs[..., 1] << 4), scale_e8m0


def act_round_fp4_torch(x: torch.Tensor) -> torch.Tensor:
    """Reference for act_round_fp4: same arguments, same bits, any device."""
    codes, scale_e8m0 = _codes(x)
    values = torch.tensor(_MAGNITUDES + tuple(-m for m in _MAGNITUDES), device=x.device)[codes.int()]  # [M, K/32, 32]
    return (values * _power_of_two(scale_e8m0)[..., None]).reshape(x.shape).to(torch.bfloat16)


def _codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [M, K/32, 32] and scale bytes [M, K/32]."""
    rows, columns = x.shape
    blocks = x.float().reshape(rows, columns // BLOCK, BLOCK)  # [M, K/32, 32]
    scale_e8m0 = power_of_two_byte(blocks.abs().amax(-1).clamp(min=FLOOR), 1 / E2M1_MAX)  # [M, K/32]
    absolute = (blocks.abs() / _power_of_two(scale_e8m0)[..., None]).clamp(max=E2M1_MAX)
    # Codes count in steps of 0.5 up to 2, of 1 up to 4, then of 2; round() takes ties to the even code in each range.
    upper = torch.where(absolute < 4, absolute.round() + 2, (absolute / 2).round() + 4)
    magnitude = torch.where(absolute < 2, (absolute * 2).round(), upper)
    return magnitude.to(torch.uint8) | (blocks.signbit().to(torch.uint8) << 3), scale_e8m0


def _power_of_two(scale_e8m0: torch.Tensor) -> torch.Tensor:
    """float32 2^(byte - 127) for bytes 1 to 254."""
    return (scale_e8m0.to(torch.int32) << 23).view(torch.float32)


def act_quant_fp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations.

    Args:
        x: bfloat16 [M, K], finite, contiguous; K a multiple of 32.

    Returns:
        packed codes uint8 [M, K/2], and scale_e8m0 uint8 [M, K/32].

    Raises:
        TypeError: if x is not bfloat16.
        ValueError: if a shape does not fit.
    """
    _check(x)
    if not use_triton(x):
        return act_quant_fp4_torch(x)
    from v4quant.kernels._act_quant_fp4_triton import launch

    return launch(x)


def act_round_fp4(x: torch.Tensor) -> torch.Tensor:
    """Round activations to what act_quant_fp4 would store and decode again, in one pass.

    Args:
        x: as for act_quant_fp4.

    Returns:
        bfloat16 [M, K]; exact but for amax above 5 x 2^125, which may round up to infinity.

    Raises:
        TypeError, ValueError: as act_quant_fp4.
    """
    _check(x)
    if not use_triton(x):
        return act_round_fp4_torch(x)
    from v4quant.kernels._act_quant_fp4_triton import launch_round

    return launch_round(x)


def _check(x: torch.Tensor) -> None:
    require("x", x, torch.bfloat16, (None, None))
    if x.shape[1] % BLOCK:
        raise ValueError(f"x has {x.shape[1]} columns, expected a multiple of {BLOCK}")
