"""Quantised activations and weights, and router picks, for tests of matrix products."""

import torch


def activations(tokens: int, columns: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations: float8_e4m3fn [tokens, columns] and E8M0 scales [tokens, columns / 128]; some rows are zero."""
    random = torch.Generator().manual_seed(seed)
    codes = (torch.randn(tokens, columns, generator=random) * 100).clamp(-448, 448)
    codes[3::7] = 0
    scale_e8m0 = torch.randint(114, 124, (tokens, columns // 128), generator=random, dtype=torch.uint8)
    return codes.to(torch.float8_e4m3fn), scale_e8m0


def fp8_weight(
    shape: tuple[int, ...], scale_dtype: torch.dtype, seed: int = 2, exponent: int = -6
) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes, and a scale about 2^exponent for each block of 128 x 128."""
    random = torch.Generator().manual_seed(seed)
    codes = (torch.randn(shape, generator=random) * 16).clamp(-448, 448).to(torch.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // 128), shape[-1] // 128)
    byte = torch.randint(127 + exponent - 6, 127 + exponent - 2, blocks, generator=random, dtype=torch.uint8)
    if scale_dtype == torch.uint8:
        return codes, byte
    return codes, (byte.int() << 23).view(torch.float32) * (1 + torch.rand(blocks, generator=random))


def fp4_weight(shape: tuple[int, ...], seed: int = 2, exponent: int = -4) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed E2M1 of every code, and an E8M0 scale about 2^exponent for each 32 columns."""
    random = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=random, dtype=torch.uint8)
    scales = (*shape[:-1], shape[-1] // 32)
    return packed, torch.randint(127 + exponent - 2, 127 + exponent + 1, scales, generator=random, dtype=torch.uint8)


def experts(kind: str, count: int, width: int, hidden: int) -> list[torch.Tensor]:
    """Experts of kind "fp4", "fp8" or "fp8 float32 scales", at which some gates meet the SwiGLU limit.

    Returns:
        w1, its scales, w3, its scales, w2, its scales.
    """
    parts: list[torch.Tensor] = []
    for seed, shape in enumerate([(count, width, hidden), (count, width, hidden), (count, hidden, width)]):
        if kind == "fp4":
            parts += fp4_weight(shape, seed)
        else:
            parts += fp8_weight(shape, torch.float32 if "float32" in kind else torch.uint8, seed)
    return parts


def picks(tokens: int, slots: int, count: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts and positive weights for each token; the last expert, and one in the middle, stay empty."""
    random = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, count, generator=random)
    scores[:, [count // 2, count - 1]] = -1
    return scores.topk(slots).indices, torch.rand(tokens, slots, generator=random) + 0.1
