"""Stored weights to BF16: value = code * scale, in FP32, rounded once, nearest even.

    FP4: E2M1 [N, K], a scale for each 32 columns of a row       FP8: E4M3 [N, K], a scale for each block of 128 x 128

Scales are E8M0 bytes or FP32 (the Base releases). Code times a power of two is exact in BF16 wherever the result is in
its range: for E2M1 with scale bytes 1 to 252, for E4M3 with 3 to 246. A NaN code or scale gives NaN. Source:
`weight_dequant_kernel` of DeepSeek's released inference code; formats: OCP Microscaling Formats (MX) v1.0, section 5.3.
"""

import torch

from v4quant.kernels._backend import require, use_triton

FP4_BLOCK = 32
FP8_BLOCK = 128
# Rows at a time in the references: float32 copies stay in a CPU's cache.
_PIECE_ROWS = FP8_BLOCK
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize_fp4_torch(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Reference for dequantize_fp4: same arguments, same bits, any device."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=packed.device)
    values = torch.tensor(_E2M1 + tuple(-value for value in _E2M1), device=packed.device)
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], -1)  # [256, 2], low nibble first
    for first in range(0, rows, _PIECE_ROWS):
        piece = slice(first, first + _PIECE_ROWS)
        blocks = pairs[packed[piece].int()].reshape(-1, columns // FP4_BLOCK, FP4_BLOCK)  # [n, K/32, 32]
        out[piece] = (blocks * scale_values(scale[piece])[..., None]).flatten(1)
    return out


def dequantize_fp8_torch(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Reference for dequantize_fp8: same arguments, same bits, any device."""
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=codes.device)
    for number, first in enumerate(range(0, rows, FP8_BLOCK)):
        piece = slice(first, first + FP8_BLOCK)
        wide = scale_values(scale[number]).repeat_interleave(FP8_BLOCK)[:columns]  # [K]
        out[piece] = codes[piece].float() * wide
    return out


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """float32 of scales: E8M0 bytes decoded, FP32 as it is."""
    if scale.dtype == torch.float32:
        return scale
    bits = scale.to(torch.int32) << 23
    bits = torch.where(scale == 0, 0x0040_0000, bits)
    return torch.where(scale == 255, 0x7FC0_0000, bits).view(torch.float32)


def dequantize_fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode an FP4 weight.

    Args:
        packed: uint8 [N, K/2], contiguous; two E2M1 codes a byte, the even column in the low nibble.
        scale: uint8 (E8M0) or float32 [N, K/32].

    Returns:
        bfloat16 [N, K].

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    require("packed", packed, torch.uint8, (None, None))
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if columns % FP4_BLOCK:
        raise ValueError(f"packed has {packed.shape[1]} columns, expected a multiple of {FP4_BLOCK // 2}")
    _require_scale(scale, (rows, columns // FP4_BLOCK))
    if not use_triton(packed):
        return dequantize_fp4_torch(packed, scale)
    from v4quant.kernels._dequantize_triton import launch_fp4

    return launch_fp4(packed, scale)


def dequantize_fp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode an FP8 weight.

    Args:
        codes: float8_e4m3fn [N, K], contiguous.
        scale: uint8 (E8M0) or float32 [ceil(N/128), ceil(K/128)].

    Returns:
        bfloat16 [N, K].

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    require("codes", codes, torch.float8_e4m3fn, (None, None))
    _require_scale(scale, (-(-codes.shape[0] // FP8_BLOCK), -(-codes.shape[1] // FP8_BLOCK)))
    if not use_triton(codes):
        return dequantize_fp8_torch(codes, scale)
    from v4quant.kernels._dequantize_triton import launch_fp8

    return launch_fp8(codes, scale)


def _require_scale(scale: torch.Tensor, shape: tuple[int, int]) -> None:
    if scale.dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"scale is {scale.dtype}, expected torch.uint8 (E8M0 bytes) or torch.float32")
    require("scale", scale, scale.dtype, shape)
