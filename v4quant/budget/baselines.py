"""What V4 is measured against: DeepSeek-V3.2, and the same model with a GQA-8 cache in BF16.

Source of V3.2's dimensions: its config.json. Its cache entries: FlashMLA's README (656 B: 512 E4M3, 4 F32 scales,
64 BF16) and its indexer (132 B: 128 E4M3, one F32 scale).
"""

from v4quant.budget.flops import Flops
from v4quant.config import V4Config

_LAYERS, _DENSE_LAYERS, _HIDDEN, _VOCAB = 61, 3, 7168, 129_280
_HEADS, _QUERY_RANK, _KV_RANK, _ROPE, _NOPE, _VALUE = 128, 1536, 512, 64, 128, 128
_EXPERTS, _ACTIVE, _SHARED, _EXPERT_WIDTH, _DENSE_WIDTH = 256, 8, 1, 2048, 18_432
_INDEX_HEADS, _INDEX_DIM, _TOP_K = 64, 128, 2048

V32_ENTRY_BYTES, V32_INDEX_KEY_BYTES = 656, 132
V32_BF16_ENTRY_BYTES, V32_BF16_INDEX_KEY_BYTES = 2 * (_KV_RANK + _ROPE), 2 * _INDEX_DIM
_GQA_KV_HEADS, _GQA_HEAD_DIM = 8, 128

# As for V4 (flops.FP8_EQUIVALENT); V3.2's indexer scores are FP8 x FP8.
V32_FP8_EQUIVALENT = {
    "fp8_linears": 1,
    "kv_up_projection": 1,
    "router": 2,
    "head": 2,
    "core_attention": 2,
    "indexer_scores": 1,
}


def v32_kv_bytes(context: int, entry_bytes: int = V32_ENTRY_BYTES, index_key_bytes: int = V32_INDEX_KEY_BYTES) -> int:
    """Bytes of one sequence's cache: an entry and an indexer key for every token in every layer."""
    return _LAYERS * context * (entry_bytes + index_key_bytes)


def v32_parameters() -> tuple[int, int]:
    """Parameters of V3.2's matrices, total and active: MTP left out, the embedding counted in the total only."""
    dense = _DENSE_LAYERS * 3 * _HIDDEN * _DENSE_WIDTH
    expert = 3 * _HIDDEN * _EXPERT_WIDTH
    moe_layers = _LAYERS - _DENSE_LAYERS
    each = _LAYERS * (_attention_macs() + _indexer_macs() + _HIDDEN * _INDEX_HEADS + _up_projection_macs())
    trunk = each + dense + moe_layers * (_EXPERTS * _HIDDEN + _SHARED * expert) + _VOCAB * _HIDDEN
    return (
        trunk + _VOCAB * _HIDDEN + moe_layers * _EXPERTS * expert,
        trunk + moe_layers * _ACTIVE * expert,
    )


def v32_decode_flops(context: int) -> Flops:
    """FLOPs of one decode step of V3.2: latent attention over the best 2,048 tokens, up-projection absorbed."""
    moe_layers = _LAYERS - _DENSE_LAYERS
    feed_forward = _DENSE_LAYERS * 3 * _HIDDEN * _DENSE_WIDTH
    feed_forward += moe_layers * (_ACTIVE + _SHARED) * 3 * _HIDDEN * _EXPERT_WIDTH
    macs = {
        "fp8_linears": _LAYERS * (_attention_macs() + _indexer_macs()) + feed_forward,
        "kv_up_projection": _LAYERS * _up_projection_macs(),
        "router": moe_layers * _EXPERTS * _HIDDEN + _LAYERS * _INDEX_HEADS * _HIDDEN,
        "head": _VOCAB * _HIDDEN,
        "core_attention": _LAYERS * _HEADS * min(_TOP_K, context) * (_KV_RANK + _ROPE + _KV_RANK),
        "indexer_scores": _LAYERS * _INDEX_HEADS * _INDEX_DIM * context,
    }
    return {part: 2.0 * count for part, count in macs.items()}


def v32_fp8_equivalents(flops: Flops) -> float:
    """The sum of V3.2's parts, each in equivalents of FP8 operations."""
    return sum(V32_FP8_EQUIVALENT[part] * count for part, count in flops.items())


def gqa8_kv_bytes(config: V4Config, context: int) -> int:
    """Bytes of one sequence's cache in BF16 with 8 KV heads of 128 in as many layers as the model has."""
    return config.num_hidden_layers * gqa8_bytes_per_token() * context


def gqa8_bytes_per_token() -> int:
    """Bytes of a token in one layer, K and V."""
    return 2 * _GQA_KV_HEADS * _GQA_HEAD_DIM * 2


def gqa8_decode_flops(config: V4Config, context: int, others: float) -> float:
    """FLOPs of one decode step if every layer attended to all tokens with as many query heads as the model has.

    Args:
        others: FLOPs of everything but attention, taken over from the model.
    """
    return others + 2.0 * config.num_hidden_layers * config.num_attention_heads * 2 * _GQA_HEAD_DIM * context


def _attention_macs() -> int:
    queries = _QUERY_RANK * (_HIDDEN + _HEADS * (_NOPE + _ROPE))
    return queries + (_KV_RANK + _ROPE) * _HIDDEN + _HIDDEN * _HEADS * _VALUE


def _indexer_macs() -> int:
    return _INDEX_HEADS * _INDEX_DIM * _QUERY_RANK + _INDEX_DIM * _HIDDEN


def _up_projection_macs() -> int:
    return _KV_RANK * _HEADS * (_NOPE + _VALUE)
