"""Floating-point operations of the model for one token, part by part: twice the multiply-accumulates.

Keys that a query attends to, in a context of n tokens, itself the last: SWA min(window, n); CSA the best
min(top-k, n // 4) entries and the window; HCA n // 128 entries and the window. Scores and values are both head_dim
wide. The indexer scores all n // 4 entries. Nothing is counted for norms, RoPE, softmax, quantisation and top-k.

A prompt of n tokens is the sum over its positions, divided by n; only its last token needs the head.
"""

from collections.abc import Mapping

from v4quant.budget.layers import CSA_RATIO, HCA_RATIO, LayerKind, layers_by_kind
from v4quant.config import V4Config

# In equivalents of an FP8 operation, "as implemented": what runs in BF16 counts twice, FP4 x FP4 half, and an FP4
# weight with an FP8 activation one. The report that claims 27 % and 10 % of V3.2 gives no weights; these come within
# its digits, and others do too.
FP8_EQUIVALENT: Mapping[str, float] = {
    "fp8_linears": 1,
    "routed_experts": 1,
    "output_groups": 1,
    "router": 2,
    "hyper_connections": 2,
    "compressors": 2,
    "head": 2,
    "core_attention": 2,
    "indexer_scores": 0.5,
}
Flops = dict[str, float]


def fp8_equivalents(flops: Mapping[str, float]) -> float:
    """The sum of parts, each in equivalents of FP8 operations."""
    return sum(FP8_EQUIVALENT[part] * count for part, count in flops.items())


def decode_flops(config: V4Config, context: int) -> Flops:
    """FLOPs of one decode step, by part, keys as in FP8_EQUIVALENT; MTP blocks left out.

    Args:
        context: tokens that the step sees, itself included.
    """
    return _flops(config, _Keys(config, context, whole_prompt=False), head_share=1)


def prefill_flops(config: V4Config, context: int) -> Flops:
    """FLOPs of a prompt of so many tokens, divided by them, by part."""
    return _flops(config, _Keys(config, context, whole_prompt=True), head_share=1 / context)


class _Keys:
    """Keys of a query: of the last of n tokens, or on average over all of them.

    Attributes:
        csa, hca, swa: that a query of such a layer attends to.
        indexed: that the indexer of a CSA layer scores.
    """

    def __init__(self, config: V4Config, context: int, *, whole_prompt: bool) -> None:
        seen = _mean_seen if whole_prompt else _seen
        self.swa = seen(context, 1, config.sliding_window)
        self.csa = seen(context, CSA_RATIO, config.index_topk) + self.swa
        self.hca = seen(context, HCA_RATIO, context) + self.swa
        self.indexed = seen(context, CSA_RATIO, context)


def _seen(context: int, ratio: int, most: int) -> float:
    """Entries of `ratio` tokens each that the last token sees, at most `most`."""
    return min(context // ratio, most)


def _mean_seen(context: int, ratio: int, most: int) -> float:
    """The same, averaged over every position: the sum over t = 1 to n of min(t // ratio, most), divided by n."""
    rising = min(context, ratio * most)  # from there on it is `most`
    whole = rising // ratio
    total = ratio * whole * (whole - 1) // 2 + whole * (rising - ratio * whole + 1)
    return (total + (context - rising) * most) / context


def _flops(config: V4Config, keys: _Keys, head_share: float) -> Flops:
    layers, kinds = config.num_hidden_layers, layers_by_kind(config)
    csa, hca = kinds[LayerKind.CSA], kinds[LayerKind.HCA]
    hidden, width, heads = config.hidden_size, config.moe_intermediate_size, config.num_attention_heads
    queries, grouped = heads * config.head_dim, config.o_groups * config.o_lora_rank
    index_width = config.index_n_heads * config.index_head_dim
    streams = config.hc_mult
    attention = config.q_lora_rank * (hidden + queries) + config.head_dim * hidden + hidden * grouped
    expert = 3 * hidden * width
    # K and gate of each token; twice as wide in CSA, where windows overlap, and in its indexer.
    csa_compressor = 2 * 2 * (config.head_dim + config.index_head_dim) * hidden + config.index_n_heads * hidden
    mixing = 2 * (2 + streams) * streams * streams * hidden
    attended = csa * keys.csa + hca * keys.hca + kinds[LayerKind.SWA] * keys.swa
    macs = {
        "fp8_linears": layers * (attention + config.n_shared_experts * expert) + csa * index_width * config.q_lora_rank,
        "routed_experts": layers * config.num_experts_per_tok * expert,
        "output_groups": layers * grouped * queries // config.o_groups,
        "router": layers * config.n_routed_experts * hidden,
        "hyper_connections": layers * mixing,
        "compressors": csa * csa_compressor + hca * 2 * config.head_dim * hidden,
        "head": head_share * (config.vocab_size * hidden + streams * streams * hidden),
        "core_attention": 2 * queries * attended,
        "indexer_scores": csa * index_width * keys.indexed,
    }
    return {part: 2 * count for part, count in macs.items()}
