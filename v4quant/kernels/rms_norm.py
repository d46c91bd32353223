"""RMS normalisation of each row with a learned weight.

    y = x * rsqrt(mean(x ** 2) + eps) * weight

M rows, D columns. Everything in FP32, one rounding to BF16 at the end. Source: `RMSNorm` of DeepSeek's released
inference code, which holds weights as FP32; a BF16 weight is the same number.
"""

import torch

from v4quant.kernels._backend import require, use_triton

# One program holds a row. The widest of V4 has 7168 columns.
MAX_COLUMNS = 32768


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Reference for rms_norm: same arguments, any device; equal up to the order of FP32 sums."""
    y = x.float()  # [M, D]
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(torch.bfloat16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise each row.

    Args:
        x: bfloat16 [M, D], contiguous; D up to 32,768.
        weight: bfloat16 or float32 [D].
        eps: added to the mean square.

    Returns:
        bfloat16 [M, D].

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    require("x", x, torch.bfloat16, (None, None))
    if weight.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"weight is {weight.dtype}, expected torch.bfloat16 or torch.float32")
    require("weight", weight, weight.dtype, (x.shape[1],))
    if not 1 <= x.shape[1] <= MAX_COLUMNS:
        raise ValueError(f"x has {x.shape[1]} columns, expected 1 to {MAX_COLUMNS}")
    if not use_triton(x):
        return rms_norm_torch(x, weight, eps)
    from v4quant.kernels._rms_norm_triton import launch

    return launch(x, weight, eps)
