"""Indexer keys into pages and out again: RMSNorm, RoPE on the last 64 dims, Hadamard, E2M1, in one pass.

    y = bf16(x * rsqrt(mean(x ** 2) + eps) * weight)
    y[I - 64:] = bf16(rotate(y[I - 64:]))
    page <- E2M1 codes of bf16(y H_I * I ** -0.5) with a scale for each 32 (as act_quant_fp4)

T tokens, I the indexer's head dimension (128), slot = page x entries of a page + entry. Slot -1 writes nothing and
reads zeros. Bytes: kv_layout. Reading gives exactly what the released inference code scores with (`Indexer.forward`).
"""

import torch

from v4quant.kernels._backend import use_triton
from v4quant.kernels.act_quant_fp4 import act_quant_fp4_torch
from v4quant.kernels.hadamard import hadamard_torch
from v4quant.kernels.kv_cache import require_entries, require_slots
from v4quant.kernels.kv_layout import KEY_BLOCK, PageLayout, key_layout
from v4quant.kernels.rms_norm import rms_norm_torch
from v4quant.kernels.rope import rope_torch_

# float32 of E2M1 codes.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def indexer_key_write_fp4_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: PageLayout,
) -> None:
    """Reference for indexer_key_write_fp4: same arguments, any device."""
    kept = slots >= 0
    slots, x = slots[kept].long(), x[kept]
    y = rope_torch_(rms_norm_torch(x, weight, eps)[:, None], cos_sin[kept])[:, 0]  # [T, I]
    packed, scale_e8m0 = act_quant_fp4_torch(hadamard_torch(y))  # [T, I/2], [T, I/32]
    flat = pages.view(-1)
    flat[layout.data(pages, slots)] = packed
    flat[layout.scales(pages, slots)] = scale_e8m0


def indexer_key_write_fp4(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: PageLayout,
) -> None:
    """Normalise, rotate, transform, quantise and store indexer keys; no other byte of the pages changes.

    Args:
        x: bfloat16 [T, I], the output of the indexer's compressor.
        weight: bfloat16 or float32 [I], of the norm.
        eps: of the norm.
        cos_sin: float32 [T, 64] of rope_table, at the first position of an entry's window.
        pages: uint8 [P, page bytes], written.
        slots: int32 [T], below the slots of the pages and different from each other, or -1.
        layout: key_layout(entries, I).

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    require_entries(x, weight, cos_sin)
    require_slots(slots, len(x), layout, key_layout(layout.entries, x.shape[1]))
    layout.require_pages(pages)
    if not use_triton(x):
        indexer_key_write_fp4_torch(x, weight, eps, cos_sin, pages, slots, layout)
        return
    from v4quant.kernels._indexer_key_cache_triton import launch_write

    launch_write(x, weight, eps, cos_sin, pages, slots, layout)


def indexer_key_read_fp4_torch(pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout, dim: int) -> torch.Tensor:
    """Reference for indexer_key_read_fp4: same arguments, same bits, any device."""
    flat, kept = pages.view(-1), slots >= 0
    slots = slots[kept].long()
    packed = flat[layout.data(pages, slots)]  # [T, I/2]
    codes = torch.stack([packed & 15, packed >> 4], 2).view(-1, dim // KEY_BLOCK, KEY_BLOCK)  # [T, I/32, 32]
    scale = (flat[layout.scales(pages, slots)].to(torch.int32) << 23).view(torch.float32)  # [T, I/32]
    values = torch.tensor(_VALUES, device=pages.device)[codes.int()] * scale[..., None]
    out = torch.zeros(len(kept), dim, dtype=torch.bfloat16, device=pages.device)
    out[kept] = values.flatten(1).to(torch.bfloat16)
    return out


def indexer_key_read_fp4(pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout, dim: int = 128) -> torch.Tensor:
    """Read keys back.

    Args:
        pages: uint8 [P, page bytes].
        slots: int32 [T], of keys that were written, or -1.
        layout: key_layout(entries, dim).
        dim: I.

    Returns:
        bfloat16 [T, I]; zeros for slot -1.

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    require_slots(slots, None, layout, key_layout(layout.entries, dim))
    layout.require_pages(pages)
    if not use_triton(pages):
        return indexer_key_read_fp4_torch(pages, slots, layout, dim)
    from v4quant.kernels._indexer_key_cache_triton import launch_read

    return launch_read(pages, slots, layout, dim)
