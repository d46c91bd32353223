"""Quantised activations and weights, and router picks, for tests of matrix products."""

from typing import Any

import torch

Device = torch.device | str


def _on(device: Device, seed: int) -> dict[str, Any]:
    """Arguments of torch's random functions."""
    return {"device": device, "generator": torch.Generator(device).manual_seed(seed)}


def activations(tokens: int, columns: int, seed: int = 1, device: Device = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Activations: float8_e4m3fn [tokens, columns] and E8M0 scales [tokens, columns / 128]; some rows are zero."""
    on = _on(device, seed)
    codes = (torch.randn(tokens, columns, **on) * 100).clamp(-448, 448)
    codes[3::7] = 0
    scale_e8m0 = torch.randint(114, 124, (tokens, columns // 128), dtype=torch.uint8, **on)
    return codes.to(torch.float8_e4m3fn), scale_e8m0


def fp8_weight(
    shape: tuple[int, ...], scale_dtype: torch.dtype, seed: int = 2, exponent: int = -6, device: Device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes, and a scale about 2^exponent for each block of 128 x 128."""
    on = _on(device, seed)
    codes = torch.randn(shape, **on).mul_(16).clamp_(-448, 448).to(torch.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), shape[-1] // 128)
    byte = torch.randint(127 + exponent - 6, 127 + exponent - 2, blocks, dtype=torch.uint8, **on)
    if scale_dtype == torch.uint8:
        return codes, byte
    return codes, (byte.int() << 23).view(torch.float32) * (1 + torch.rand(blocks, **on))


def fp4_weight(
    shape: tuple[int, ...], seed: int = 2, exponent: int = -4, device: Device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed E2M1 of every code, and an E8M0 scale about 2^exponent for each 32 columns."""
    on = _on(device, seed)
    packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, **on)
    scales = (*shape[:-1], shape[-1] // 32)
    return packed, torch.randint(127 + exponent - 2, 127 + exponent + 1, scales, dtype=torch.uint8, **on)


def experts(kind: str, count: int, width: int, hidden: int, device: Device = "cpu") -> list[torch.Tensor]:
    """Experts of kind "fp4", "fp8" or "fp8 float32 scales", at which some gates meet the SwiGLU limit.

    Returns:
        w1, its scales, w3, its scales, w2, its scales.
    """
    parts: list[torch.Tensor] = []
    for seed, shape in enumerate([(count, width, hidden), (count, width, hidden), (count, hidden, width)]):
        if kind == "fp4":
            parts += fp4_weight(shape, seed, device=device)
        else:
            parts += fp8_weight(shape, torch.float32 if "float32" in kind else torch.uint8, seed, device=device)
    return parts


def picks(
    tokens: int, slots: int, count: int, seed: int = 3, device: Device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts and positive weights for each token; the last expert, and one in the middle, stay empty."""
    on = _on(device, seed)
    scores = torch.rand(tokens, count, **on)
    scores[:, [count // 2, count - 1]] = -1
    return scores.topk(slots).indices, torch.rand(tokens, slots, **on) + 0.1
