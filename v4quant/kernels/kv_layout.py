"""Bytes of the two caches: KV entries and indexer keys, in block-planar pages.

An entry has data and scales, and a page of n entries holds all data first, then all scales, then padding:

    [n x data][n x scales][padding]        entry j: data at j x data bytes, scales at n x data + j x scale bytes

- KV entry, D wide: D - 64 bytes E4M3, 64 RoPE values in BF16; one E8M0 byte for each 64 of the D - 64, and zeros up to
  a multiple of 8. D = 512: 448 + 128 and 7 + 1, 584 bytes. Pages are padded to a multiple of the data bytes (576), so
  that a view with rows of that size divides them.
- Indexer key, I wide: I/2 bytes of E2M1 pairs, low nibble the even element; one E8M0 byte for each 32. I = 128: 68
  bytes.

Source: FlashMLA's "MODEL1" layout, which sglang and vLLM share, and the FP4 index cache of sglang and DeepGEMM.
"""

from dataclasses import dataclass

import torch

from v4quant.kernels._backend import require

ROPE_DIM = 64
KV_BLOCK = 64
KEY_BLOCK = 32


@dataclass(frozen=True)
class PageLayout:
    """Where an entry lies in its page.

    Attributes:
        entries: of a page.
        data_bytes, scale_bytes: of an entry.
        pad_to: a page's size is a multiple of it.
    """

    entries: int
    data_bytes: int
    scale_bytes: int
    pad_to: int

    @property
    def page_bytes(self) -> int:
        return -(-self.entries * (self.data_bytes + self.scale_bytes) // self.pad_to) * self.pad_to

    def empty_pages(self, slots: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Pages with room for so many entries, zeros: uint8 [pages, page_bytes]."""
        pages = -(-slots // self.entries)
        return torch.zeros(pages, self.page_bytes, dtype=torch.uint8, device=device)

    def require_pages(self, pages: torch.Tensor) -> None:
        """Check a tensor of pages.

        Raises:
            TypeError, ValueError: if it is not uint8 [any, page_bytes], contiguous.
        """
        require("pages", pages, torch.uint8, (None, self.page_bytes))

    def data(self, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Offsets of every data byte in pages.flatten(): int64 [T, data_bytes]."""
        first = slots // self.entries * self.page_bytes + slots % self.entries * self.data_bytes  # [T]
        return first[:, None] + torch.arange(self.data_bytes, device=pages.device)

    def scales(self, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Offsets of every scale byte in pages.flatten(): int64 [T, scale_bytes]."""
        first = slots // self.entries * self.page_bytes + self.entries * self.data_bytes  # [T]
        first = first + slots % self.entries * self.scale_bytes
        return first[:, None] + torch.arange(self.scale_bytes, device=pages.device)


def kv_layout(entries: int, dim: int = 512) -> PageLayout:
    """Pages of KV entries: 256 of the window, 64 of CSA or 2 of HCA for 256 tokens.

    Raises:
        ValueError: if the page is empty, or dim is not a power of two from 128 on.
    """
    if entries < 1 or dim < 128 or dim & (dim - 1):
        raise ValueError(f"a page of {entries} entries, {dim} wide: expected 1 or more, a power of two from 128 on")
    data_bytes = (dim - ROPE_DIM) + 2 * ROPE_DIM
    return PageLayout(entries, data_bytes, scale_bytes=-(-(dim // KV_BLOCK - 1) // 8) * 8, pad_to=data_bytes)


def key_layout(entries: int, dim: int = 128) -> PageLayout:
    """Pages of indexer keys: 64 for 256 tokens.

    Raises:
        ValueError: if the page is empty, or dim is not a power of two from 64 on.
    """
    if entries < 1 or dim < 64 or dim & (dim - 1):
        raise ValueError(f"a page of {entries} keys, {dim} wide: expected 1 or more, a power of two from 64 on")
    return PageLayout(entries, dim // 2, dim // KEY_BLOCK, pad_to=1)
