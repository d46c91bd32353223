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
    # Weights without a single scale are told by themselves; the audit lists the scales that are missing.
    return [encoding for encoding in fitting if encoding.scale_dtype == scale] or ([] if scale else fitting)


def _describe(counts: Counter[tuple[str, str]]) -> str:
    scale = _most_common(counts, "scale")
    return f"{_most_common(counts, 'weight') or 'nothing'} with {scale + ' scales' if scale else 'no scales'}"


def stored_dimensions(entries: Entries, parsed: Parsed) -> dict[str, tuple[int, str]]:
    """Dimensions that the stored shapes tell: key of config.json -> value, and the tensor that says so."""
    found: dict[str, tuple[int, str]] = {}

    def note(key: str, name: str, value: int) -> None:
        found.setdefault(key, (value, name))

    most = (-1, "")
    for name, parts in parsed.items():
        shape = entries[name].shape
        match parts.module, parts.leaf, len(shape):
            case "embed", "weight", 2 if not parts.block:
                note("vocab_size", name, shape[0])
                note("hidden_size", name, shape[1])
            case "attn", "attn_sink", 1:
                note("num_attention_heads", name, shape[0])
            case "attn.wq_a", "weight", 2:
                note("q_lora_rank", name, shape[0])
            case "ffn.gate", "weight", 2:
                note("n_routed_experts", name, shape[0])
            case "ffn.experts.w1", "weight", 2:
                note("moe_intermediate_size", name, shape[0])
        if parts.block == "layers":
            most = max(most, (parts.index, name))
    if most[1]:
        note("num_hidden_layers", most[1], most[0] + 1)
    return found


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
    mtp_blocks = len({parts.index for parts in parsed.values() if parts.block == "mtp"})
    ratios = stored_ratios(entries, parsed, layers) + [0] * mtp_blocks
    try:
        return V4Config.from_json({**config_json, **dimensions, "compress_ratios": ratios}, "stored")
    except UsageError:
        return None
