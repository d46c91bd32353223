"""Hadamard transform of each row, normalised: spreads outliers over the indexer's queries and keys before FP4.

    y = x H_D * D ** -0.5,   H_1 = [1],   H_2d = [[H_d, H_d], [H_d, -H_d]]        (Sylvester's order)

M rows, D columns, a power of two; V4's indexer has D = 128. FP32 inside, one rounding to BF16. The sums run as
butterflies over strides 1, 2, 4, ..., D/2, so that bits do not depend on who computes
them. Source: `rotate_activation` of DeepSeek's released inference code.
"""

import math

import torch

from v4quant.kernels._backend import require, use_triton

MAX_COLUMNS = 4096


def hadamard_torch(x: torch.Tensor) -> torch.Tensor:
    """Reference for hadamard: same arguments, same bits, any device."""
    rows, columns = x.shape
    y = x.float()
    stride = 1
    while stride < columns:
        first, second = y.reshape(rows, columns // (2 * stride), 2, stride).unbind(2)  # [M, D/2s, s]
        y = torch.stack([first + second, first - second], 2)
        stride *= 2
    return (y.reshape(rows, columns) * (1 / math.sqrt(columns))).to(torch.bfloat16)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Transform each row.

    Args:
        x: bfloat16 [M, D], finite, contiguous; D a power of two from 8 to 4096.

    Returns:
        bfloat16 [M, D].

    Raises:
        TypeError: if x is not bfloat16.
        ValueError: if D is no such power of two, or x is not contiguous.
    """
    require("x", x, torch.bfloat16, (None, None))
    columns = x.shape[1]
    if not 8 <= columns <= MAX_COLUMNS or columns & (columns - 1):
        raise ValueError(f"x has {columns} columns, expected a power of two from 8 to {MAX_COLUMNS}")
    if not use_triton(x):
        return hadamard_torch(x)
    from v4quant.kernels._hadamard_triton import launch

    return launch(x)
