"""Rotary position embedding of the last R dims of each head, adjacent pairs, or the inverse rotation.

    (x_2i, x_2i+1) -> (x_2i cos_i - x_2i+1 sin_i, x_2i sin_i + x_2i+1 cos_i);  inverse: -sin_i

T tokens, H heads, D dims a head (512, or 128 in the indexer), R = 64 of them rotated. FP32 inside, one rounding to
BF16; the other dims stay. Source: `apply_rotary_emb` of DeepSeek's released inference code. The inverse
undoes, on the attention's output and at the query's position, the rotation of keys that are values too.
"""

import torch

from v4quant.kernels._backend import require, use_triton


def rope_torch_(x: torch.Tensor, cos_sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """Reference for rope_: same arguments, same bits, any device."""
    rotated = x[..., x.shape[-1] - cos_sin.shape[-1] :]  # [T, H, R]
    pairs = rotated.float().reshape(*x.shape[:-1], cos_sin.shape[-1] // 2, 2)
    even, odd = pairs.unbind(-1)  # [T, H, R/2]
    cos, sin = cos_sin[:, None].chunk(2, -1)  # [T, 1, R/2]
    sin = -sin if inverse else sin
    rotated.copy_(torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2))
    return x


def rope_(x: torch.Tensor, cos_sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """Rotate the last R dims of each head in place.

    Args:
        x: bfloat16 [T, H, D], finite, contiguous.
        cos_sin: float32 [T, R] of rope_table; R a power of two, at most D.
        inverse: rotate back.

    Returns:
        x itself.

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    require("x", x, torch.bfloat16, (None, None, None))
    require("cos_sin", cos_sin, torch.float32, (x.shape[0], None))
    rope_dims = cos_sin.shape[1]
    if not 2 <= rope_dims <= x.shape[2] or rope_dims & (rope_dims - 1):
        raise ValueError(f"cos_sin has {rope_dims} columns, expected a power of two from 2 to {x.shape[2]}")
    if not use_triton(x):
        return rope_torch_(x, cos_sin, inverse)
    from v4quant.kernels._rope_triton import launch_

    return launch_(x, cos_sin, inverse)


def rope(x: torch.Tensor, cos_sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """Rotate as rope_ does, in a new tensor."""
    return rope_(x.clone(), cos_sin, inverse)
