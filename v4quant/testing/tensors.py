"""Tensors that find faults in kernels: every bit pattern, odd sizes."""

import torch


def every_finite_bf16(columns: int) -> torch.Tensor:
    """All 65,280 finite BF16 patterns, zeros behind them: bfloat16 [rows, columns]."""
    bits = torch.arange(65536, dtype=torch.int32)
    finite = bits[(bits & 0x7FFF) < 0x7F80]
    rows = -(-finite.numel() // columns)
    padded = torch.zeros(rows * columns, dtype=torch.int32)
    padded[: finite.numel()] = finite
    return padded.to(torch.uint16).view(torch.bfloat16).reshape(rows, columns)
