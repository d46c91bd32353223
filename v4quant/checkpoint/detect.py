"""Tell a checkpoint's format and model from what is stored: tensor names, dtypes and shapes, never from config.json.

config.json is checked against the answer afterwards (audit.py): a copied or edited config is the commonest fault of
published conversions.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from v4quant.checkpoint.header import TensorEntry
from v4quant.config import V4Config
from v4quant.encodings import BF16, FP4, FP8, FP8_F32_SCALE, SCHEMES, Encoding, Scheme
from v4quant.errors import CheckpointError, UsageError
from v4quant.names import Role, TensorName

_ENCODINGS = (FP4, FP8, FP8_F32_SCALE, BF16)

Parsed = Mapping[str, TensorName]
Entries = Mapping[str, TensorEntry]


def detect_scheme(entries: Entries, parsed: Parsed, where: str) -> Scheme:
    """Tell how matrices are stored, by what most of them have; strays are the audit's business.

    Args:
        entries: the stored tensors by name.
        parsed: the names among them that are V4 names, taken apart.
        where: the checkpoint, for errors.

    Raises:
        CheckpointError: if the storage is none that v4quant knows.
    """
    experts: Counter[tuple[str, str]] = Counter()
    dense: Counter[tuple[str, str]] = Counter()
    for name, parts in parsed.items():
        if parts.is_quantised:
            counts = experts if parts.role is Role.ROUTED_EXPERTS else dense
            counts[parts.leaf, entries[name].dtype] += 1
    if not experts and not dense:
        raise CheckpointError(
            f"{where}: no tensor has the name of a DeepSeek-V4 matrix, expected names such as "
            "layers.0.attn.wq_a.weight",
            hint="Names with model.layers. or self_attn. are those of transformers; v4quant reads the released names.",
        )
    for scheme in SCHEMES.values():
        if scheme.expert in _fitting(experts) and scheme.dense in _fitting(dense):
            return scheme
    known = ", ".join(f"{s.name} ({s.expert.name} experts, {s.dense.name} elsewhere)" for s in SCHEMES.values())
    raise CheckpointError(
        f"{where}: stores routed experts as {_describe(experts)} and other matrices as {_describe(dense)}; "
        f"expected one of: {known}",
        hint="Convert from the released checkpoint; this form is not supported.",
    )


def _count(counts: Counter[tuple[str, str]], leaf: str) -> int:
    return sum(count for (found, _), count in counts.items() if found == leaf)


def _most_common(counts: Counter[tuple[str, str]], leaf: str) -> str:
    """The commonest dtype among weights or scales; "" where there are none."""
    of_leaf = Counter({dtype: count for (found, dtype), count in counts.items() if found == leaf})
    return of_leaf.most_common(1)[0][0] if of_leaf else ""


def _fitting(counts: Counter[tuple[str, str]]) -> list[Encoding]:
    """The encodings that have the commonest dtypes; all of them where nothing is stored."""
    weight, scale = _most_common(counts, "weight"), _most_common(counts, "scale")
    if not weight and not scale:
        return list(_ENCODINGS)
    fitting = [encoding for encoding in _ENCODINGS if encoding.weight_dtype == weight]
    # Weights most of which have no scale are told by themselves; the audit lists the scales that are missing or astray.
    has_scales = 2 * _count(counts, "scale") > _count(counts, "weight")
    return [encoding for encoding in fitting if encoding.scale_dtype == scale] or ([] if has_scales else fitting)


def _describe(counts: Counter[tuple[str, str]]) -> str:
    scale = _most_common(counts, "scale")
    return f"{_most_common(counts, 'weight') or 'nothing'} with {scale + ' scales' if scale else 'no scales'}"


# Module and leaf -> the keys of config.json that an axis of its shape tells.
_TOLD_BY: dict[tuple[str, str], tuple[tuple[str, int], ...]] = {
    ("embed", "weight"): (("vocab_size", 0), ("hidden_size", 1)),
    ("attn", "attn_sink"): (("num_attention_heads", 0),),
    ("attn.kv_norm", "weight"): (("head_dim", 0),),
    ("attn.wq_a", "weight"): (("q_lora_rank", 0),),
    ("attn.indexer.weights_proj", "weight"): (("index_n_heads", 0),),
    ("attn.indexer.compressor.norm", "weight"): (("index_head_dim", 0),),
    ("ffn.gate", "weight"): (("n_routed_experts", 0),),
    ("ffn.gate", "tid2eid"): (("num_experts_per_tok", 1),),
    ("ffn.experts.w1", "weight"): (("moe_intermediate_size", 0),),
    ("", "hc_head_base"): (("hc_mult", 0),),
    ("markov_head.markov_w1", "weight"): (("dspark_markov_rank", 1),),
    ("markov_head.markov_w2", "weight"): (("dspark_markov_rank", 1),),
    ("markov_head.embed", "weight"): (("dspark_markov_rank", 1),),
    ("markov_head.head", "weight"): (("dspark_markov_rank", 1),),
}
_DSPARK_MODULES = {"main_proj", "main_norm", "markov_head.markov_w1", "markov_head.embed", "confidence_head.proj"}


def stored_dimensions(entries: Entries, parsed: Parsed) -> dict[str, tuple[int, str]]:
    """Dimensions that most of the stored shapes tell: key of config.json -> value, and a tensor that says so."""
    votes: dict[str, Counter[int]] = {}
    witness: dict[tuple[str, int], str] = {}

    def vote(key: str, name: str, value: int) -> None:
        votes.setdefault(key, Counter())[value] += 1
        witness.setdefault((key, value), name)

    def result() -> dict[str, tuple[int, str]]:
        winners = {key: counts.most_common(1)[0][0] for key, counts in votes.items()}
        return {key: (value, witness[key, value]) for key, value in winners.items()}

    last = (-1, "")
    for name, parts in parsed.items():
        shape = entries[name].shape
        for key, axis in _TOLD_BY.get((parts.module, parts.leaf), ()):
            if axis < len(shape):
                vote(key, name, shape[axis])
        if parts.block == "layers" and parts.role is Role.ATTENTION:
            last = max(last, (parts.index, name))
    if last[1]:
        vote("num_hidden_layers", last[1], last[0] + 1)
    told = result()
    width = told.get("num_attention_heads", (0, ""))[0] * told.get("head_dim", (0, ""))[0]
    for name, parts in parsed.items():
        if (parts.module, parts.leaf, len(entries[name].shape)) == ("attn.wo_a", "weight", 2):
            rows, columns = entries[name].shape  # [groups * rank, heads * head_dim / groups]
            groups = width // columns if columns else 0
            if groups and groups * columns == width and rows % groups == 0:
                vote("o_groups", name, groups)
                vote("o_lora_rank", name, rows // groups)
    return result()


def stored_mtp_blocks(parsed: Parsed) -> int:
    """Number of MTP blocks; like a layer, a block is there where it has some of its attention."""
    return len({parts.index for parts in parsed.values() if parts.block == "mtp" and parts.role is Role.ATTENTION})


def is_dspark_stored(parsed: Parsed) -> bool:
    """True where the MTP blocks are DSpark stages."""
    return any(parts.module in _DSPARK_MODULES for parts in parsed.values())


def stored_ratios(entries: Entries, parsed: Parsed, layers: int) -> list[int]:
    """Compression ratio of each layer, told by the rows of its compressor's position table; 0 where it has none."""
    ratios = [0] * layers
    for name, parts in parsed.items():
        if (
            parts.block == "layers"
            and parts.index < layers
            and (parts.module, parts.leaf) == ("attn.compressor", "ape")
        ):
            ratios[parts.index] = (*entries[name].shape, 0)[0]
    return ratios


def stored_config(config_json: Mapping[str, Any], entries: Entries, parsed: Parsed) -> V4Config | None:
    """The model that the stored tensors are of, in the words of a config; None where they make up no V4 model.

    Args:
        config_json: the parsed config.json, for what headers do not tell.
    """
    dimensions = {key: value for key, (value, _) in stored_dimensions(entries, parsed).items()}
    layers = dimensions.get("num_hidden_layers", 0)
    if not 1 <= layers <= 1024:  # the bound of config.py; a hostile name may claim layer 9999
        return None
    ratios = stored_ratios(entries, parsed, layers) + [0] * stored_mtp_blocks(parsed)
    words = {**config_json, **dimensions, "compress_ratios": ratios}
    words["num_hash_layers"] = min(config_json["num_hash_layers"], layers)
    if is_dspark_stored(parsed):
        words.setdefault("dspark_target_layer_ids", _target_layer_ids(entries, dimensions.get("hidden_size", 0)))
    else:
        words = {key: value for key, value in words.items() if not key.startswith("dspark_")}
    try:
        return V4Config.from_json(words, "stored")
    except UsageError:
        return None


def _target_layer_ids(entries: Entries, hidden_size: int) -> list[int]:
    """As many layers as the first DSpark stage takes in; which ones they are, no shape tells."""
    main_proj = entries.get("mtp.0.main_proj.weight")
    columns = main_proj.shape[-1] if main_proj and main_proj.shape else 0
    return [0] * (columns // hidden_size if hidden_size else 0)
