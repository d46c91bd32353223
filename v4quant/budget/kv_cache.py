"""Bytes of the KV cache of one sequence, layer kind by layer kind.

    SWA   window x entry
    CSA   n // 4 x (entry + index key) + window x entry
    HCA   n // 128 x entry + window x entry

The window is kept at its full length from the first token on. Source of the entries: FlashMLA's tests and README and
the FP4 index cache of sglang, which the published ratios to V3.2 confirm to the printed digit; blocks of pages are
padded a little beyond these sums.
"""

from dataclasses import dataclass

from v4quant.budget.layers import CSA_RATIO, HCA_RATIO, LayerKind, layers_by_kind
from v4quant.config import V4Config

_KV_SCALE_BLOCK = 64
_KEY_SCALE_BLOCK = 32


@dataclass(frozen=True)
class CacheLayout:
    """Bytes of what is cached for one compressed or one window token.

    Attributes:
        entry_bytes: a KV entry, K and V in one.
        index_key_bytes: a key of the indexer, CSA only.
    """

    entry_bytes: int
    index_key_bytes: int


def served_layout(config: V4Config) -> CacheLayout:
    """What serving kernels keep: 448 E4M3 + 64 BF16 + 7 E8M0 + 1 of padding, and 128 E2M1 + 4 E8M0, in the releases."""
    quantised = config.head_dim - config.qk_rope_head_dim
    scales = -(-quantised // _KV_SCALE_BLOCK)
    entry = quantised + 2 * config.qk_rope_head_dim + -(-scales // 8) * 8
    return CacheLayout(entry, -(-config.index_head_dim // 2) + -(-config.index_head_dim // _KEY_SCALE_BLOCK))


def bf16_layout(config: V4Config) -> CacheLayout:
    """Everything in BF16, as the released inference code keeps it."""
    return CacheLayout(2 * config.head_dim, 2 * config.index_head_dim)


def layer_bytes(config: V4Config, kind: LayerKind, context: int, layout: CacheLayout) -> int:
    """Bytes of one layer's cache.

    Args:
        context: tokens of the sequence.
    """
    window = config.sliding_window * layout.entry_bytes
    if kind is LayerKind.CSA:
        return context // CSA_RATIO * (layout.entry_bytes + layout.index_key_bytes) + window
    if kind is LayerKind.HCA:
        return context // HCA_RATIO * layout.entry_bytes + window
    return window


def kv_bytes(config: V4Config, context: int, layout: CacheLayout) -> int:
    """Bytes of one sequence's cache, MTP blocks left out, as the published ratios leave them out."""
    return sum(layers * layer_bytes(config, kind, context, layout) for kind, layers in layers_by_kind(config).items())


def kv_bytes_per_token(config: V4Config, layout: CacheLayout) -> float:
    """Bytes that one more token adds, averaged over 128."""
    layers = layers_by_kind(config)
    csa = layers[LayerKind.CSA] * (layout.entry_bytes + layout.index_key_bytes) / CSA_RATIO
    return csa + layers[LayerKind.HCA] * layout.entry_bytes / HCA_RATIO


def compressor_state_bytes(config: V4Config) -> int:
    """FP32 state that compressors hold of one sequence: K/V sums and scores of the tokens not yet compressed.

    CSA windows overlap: 2 x 4 rows, each with two sets of columns; its indexer likewise. HCA: 128 rows.
    """
    layers = layers_by_kind(config)
    csa = 2 * CSA_RATIO * 2 * (config.head_dim + config.index_head_dim)
    hca = HCA_RATIO * config.head_dim
    return 4 * 2 * (layers[LayerKind.CSA] * csa + layers[LayerKind.HCA] * hca)


def window_saving(config: V4Config, layout: CacheLayout, *, index_keys: bool) -> float:
    """How many times larger window caches of full length would be than the compressed caches, for long contexts.

    The report's "about 8x" is without the indexer's keys. Infinite where no layer compresses.
    """
    kept = layout if index_keys else CacheLayout(layout.entry_bytes, 0)
    slope = kv_bytes_per_token(config, kept)
    return config.num_hidden_layers * layout.entry_bytes / slope if slope else float("inf")
