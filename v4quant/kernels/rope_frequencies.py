"""Rotation frequencies of RoPE, plain or stretched by YaRN, and the cos/sin rows of given positions.

    f_i = theta ** (-2 i / R),  i = 0 .. R/2 - 1
    YaRN: f_i / factor * (1 - keep_i) + f_i * keep_i,   keep_i = 1 - clamp((i - low) / (high - low), 0, 1)
          low, high = floor, ceil of R ln(original_length / (2 pi beta)) / (2 ln theta), beta = beta_fast, beta_slow

R rotated dims (64 in V4), T positions. Layers with compression have theta 160,000 and YaRN (factor 16 over 65,536,
beta 32 and 1); window-only layers theta 10,000 without. No other factor is applied anywhere. Source:
`precompute_freqs_cis` of DeepSeek's released inference code.
"""

import math

import torch

from v4quant.config import RopeScaling


def rope_frequencies(rope_dims: int, theta: float, yarn: RopeScaling | None = None) -> torch.Tensor:
    """Frequencies in radians a token.

    Args:
        rope_dims: R, even.
        theta: base, above 1.
        yarn: stretching beyond the trained length; None for none.

    Returns:
        float32 [R/2], on the CPU.

    Raises:
        ValueError: if rope_dims is odd or theta not above 1.
    """
    if rope_dims < 2 or rope_dims % 2 or theta <= 1:
        raise ValueError(f"rope_dims is {rope_dims} and theta {theta}, expected an even number and one above 1")
    frequencies = 1 / theta ** (torch.arange(0, rope_dims, 2, dtype=torch.float32) / rope_dims)  # [R/2]
    if yarn is None:
        return frequencies

    def dim_of(turns: float) -> float:
        """The dim, not rounded, that makes so many turns within the original length."""
        return (
            rope_dims * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), rope_dims - 1)
    width = high - low if high != low else 0.001
    keep = 1 - ((torch.arange(rope_dims // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies / yarn.factor * (1 - keep) + frequencies * keep


def rope_table(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Cosines and sines for the tokens at hand; angles are FP32 products.

    Args:
        positions: int64 [T].
        frequencies: float32 [R/2], of rope_frequencies, on any device.

    Returns:
        float32 [T, R] on the positions' device: R/2 cosines, then R/2 sines.
    """
    angles = torch.outer(positions.float(), frequencies.to(positions.device))  # [T, R/2]
    # polar and cos differ by an ulp on CPUs; the released code takes polar.
    rotation = torch.polar(torch.ones_like(angles), angles)
    return torch.cat([rotation.real, rotation.imag], -1)
