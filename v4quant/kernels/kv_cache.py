"""KV entries into pages and out again: RMSNorm, RoPE on the last 64 dims, E4M3 of the others, in one pass.

    y = bf16(x * rsqrt(mean(x ** 2) + eps) * weight)
    y[D - 64:] = bf16(rotate(y[D - 64:]))
    page <- E4M3 codes of y[:D - 64] with a scale for each 64 (as act_quant_fp8), then y[D - 64:] as BF16

T tokens, D the head dimension (512), S slots: slot = page x entries of a page + entry. Slot -1 writes nothing and reads
zeros. Bytes: kv_layout. Reading gives exactly what the released inference code computes with, which rounds its BF16
entries in place (`Attention.forward` and `Compressor.forward`).
"""

import torch

from v4quant.kernels._backend import require, use_triton
from v4quant.kernels.act_quant_fp8 import act_quant_fp8_torch
from v4quant.kernels.kv_layout import KV_BLOCK, ROPE_DIM, PageLayout, kv_layout
from v4quant.kernels.rms_norm import rms_norm_torch
from v4quant.kernels.rope import rope_torch_


def kv_write_fp8_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: PageLayout,
) -> None:
    """Reference for kv_write_fp8: same arguments, any device."""
    kept = slots >= 0
    slots, x = slots[kept].long(), x[kept]
    coded = x.shape[1] - ROPE_DIM
    y = rope_torch_(rms_norm_torch(x, weight, eps)[:, None], cos_sin[kept])[:, 0]  # [T, D]
    codes, scale_e8m0 = act_quant_fp8_torch(y[:, :coded].contiguous(), KV_BLOCK)  # [T, D-64], [T, D/64-1]
    rope = y[:, coded:].contiguous().view(torch.uint8)  # [T, 128]
    flat = pages.view(-1)
    flat[layout.data(pages, slots)] = torch.cat([codes.view(torch.uint8), rope], 1)
    padding = layout.scale_bytes - scale_e8m0.shape[1]
    flat[layout.scales(pages, slots)] = torch.nn.functional.pad(scale_e8m0, (0, padding))


def kv_write_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: PageLayout,
) -> None:
    """Normalise, rotate, quantise and store KV entries; no other byte of the pages changes.

    Args:
        x: bfloat16 [T, D], the output of wkv or of the compressor's pooling.
        weight: bfloat16 or float32 [D], of the norm.
        eps: of the norm.
        cos_sin: float32 [T, 64] of rope_table: at a token's position; for compressed entries at the first one of
            their window.
        pages: uint8 [P, page bytes], written.
        slots: int32 [T], below the slots of the pages and different from each other, or -1.
        layout: kv_layout(entries, D).

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    require_entries(x, weight, cos_sin)
    require_slots(slots, len(x), layout, kv_layout(layout.entries, x.shape[1]))
    layout.require_pages(pages)
    if not use_triton(x):
        kv_write_fp8_torch(x, weight, eps, cos_sin, pages, slots, layout)
        return
    from v4quant.kernels._kv_cache_triton import launch_write

    launch_write(x, weight, eps, cos_sin, pages, slots, layout)


def kv_read_fp8_torch(pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout, dim: int) -> torch.Tensor:
    """Reference for kv_read_fp8: same arguments, same bits, any device."""
    flat, coded, groups = pages.view(-1), dim - ROPE_DIM, dim // KV_BLOCK - 1
    kept = slots >= 0
    slots = slots[kept].long()
    data = flat[layout.data(pages, slots)]  # [T, data bytes]
    scale_e8m0 = flat[layout.scales(pages, slots)][:, :groups]  # [T, D/64-1]
    # An E8M0 byte is a BF16 exponent, and E4M3 x 2^k is exact in BF16.
    scale = (scale_e8m0.to(torch.int32) << 23).view(torch.float32)
    values = data[:, :coded].view(torch.float8_e4m3fn).float().view(-1, groups, KV_BLOCK) * scale[..., None]
    rope = data[:, coded:].contiguous().view(torch.bfloat16)  # [T, 64]
    out = torch.zeros(len(kept), dim, dtype=torch.bfloat16, device=pages.device)
    out[kept] = torch.cat([values.flatten(1).to(torch.bfloat16), rope], 1)
    return out


def kv_read_fp8(pages: torch.Tensor, slots: torch.Tensor, layout: PageLayout, dim: int = 512) -> torch.Tensor:
    """Read entries back.

    Args:
        pages: uint8 [P, page bytes].
        slots: int32 [T], of entries that were written, or -1.
        layout: kv_layout(entries, dim).
        dim: D.

    Returns:
        bfloat16 [T, D]; zeros for slot -1.

    Raises:
        TypeError: if a dtype is another.
        ValueError: if a shape does not fit, or a tensor is not contiguous.
    """
    require_slots(slots, None, layout, kv_layout(layout.entries, dim))
    layout.require_pages(pages)
    if not use_triton(pages):
        return kv_read_fp8_torch(pages, slots, layout, dim)
    from v4quant.kernels._kv_cache_triton import launch_read

    return launch_read(pages, slots, layout, dim)


def require_entries(x: torch.Tensor, weight: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Check entries to write, x [T, D], the weight of their norm and their rotation.

    Raises:
        TypeError, ValueError: if one does not fit.
    """
    require("x", x, torch.bfloat16, (None, None))
    tokens, dim = x.shape
    if weight.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"weight is {weight.dtype}, expected torch.bfloat16 or torch.float32")
    require("weight", weight, weight.dtype, (dim,))
    require("cos_sin", cos_sin, torch.float32, (tokens, ROPE_DIM))


def require_slots(slots: torch.Tensor, tokens: int | None, layout: PageLayout, expected: PageLayout) -> None:
    """Check slots, and the layout against that of the entry's width.

    Raises:
        TypeError, ValueError: if one is another.
    """
    require("slots", slots, torch.int32, (tokens,))
    if layout != expected:
        raise ValueError(f"layout is {layout}, expected {expected} for entries of this width")
