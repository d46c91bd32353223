"""config.json of a released checkpoint, cut down on request: fewer layers, fewer experts, small dimensions.

Source: the releases' own config.json files, in `configs/`. The Base releases differ from them in `expert_dtype` alone.
"""

import json
from collections.abc import Mapping
from enum import StrEnum
from importlib import resources
from typing import Any

from v4quant.encodings import BASE_SCHEME, NATIVE_SCHEME, Scheme
from v4quant.errors import UsageError


class Like(StrEnum):
    """The releases that a synthetic checkpoint can stand for."""

    FLASH = "flash"
    PRO = "pro"
    FLASH_BASE = "flash-base"
    PRO_BASE = "pro-base"
    FLASH_0731 = "flash-0731"
    PRO_0813 = "pro-0813"

    @property
    def is_base(self) -> bool:
        """True for the pretrained-only releases: FP8 experts, F32 scales, no side files."""
        return self in (Like.FLASH_BASE, Like.PRO_BASE)


class Vocab(StrEnum):
    """How many tokens a synthetic checkpoint knows."""

    SMALL = "small"
    """512: no tokenizer has so few."""

    FULL = "full"
    """All of the release, for its own tokenizer."""


# Small enough for a test, large enough to keep every feature: five layers hold all compression ratios of the release,
# hash-routed layers and others; matrices span several 128x128 blocks both ways; the indexer really has to choose.
_TINY_LAYERS = 5
_SMALL_VOCAB = 512
_TINY: dict[str, int] = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "q_lora_rank": 128,
    "head_dim": 128,
    "o_groups": 2,
    "o_lora_rank": 128,
    "index_n_heads": 8,
    "index_topk": 16,
    "sliding_window": 32,
}
_TINY_PRO = _TINY | {
    "moe_intermediate_size": 384,
    "num_attention_heads": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "o_groups": 4,
    "index_n_heads": 4,
}
_TINY_DSPARK: dict[str, int] = {"dspark_markov_rank": 64}

# Key of the flat inference/config.json -> key of config.json, in the order of the released files.
_INFERENCE_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_hash_layers": "num_hash_layers",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "swiglu_limit": "swiglu_limit",
    "q_lora_rank": "q_lora_rank",
    "head_dim": "head_dim",
    "rope_head_dim": "qk_rope_head_dim",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "window_size": "sliding_window",
    "original_seq_len": "rope_scaling.original_max_position_embeddings",
    "rope_theta": "rope_theta",
    "rope_factor": "rope_scaling.factor",
    "beta_fast": "rope_scaling.beta_fast",
    "beta_slow": "rope_scaling.beta_slow",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "hc_mult": "hc_mult",
    "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "dtype": "quantization_config.quant_method",
    "scale_fmt": "quantization_config.scale_fmt",
    "expert_dtype": "expert_dtype",
    "compress_rope_theta": "compress_rope_theta",
    "compress_ratios": "compress_ratios",
}
_DSPARK_KEYS = ("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank")


def synth_config(
    like: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    tiny: bool = False,
    mtp: bool = True,
    vocab: Vocab | None = None,
) -> tuple[dict[str, Any], Scheme]:
    """Build the config.json of a synthetic checkpoint.

    Args:
        like: a value of `Like`.
        layers: keep only this many layers of the trunk; embedding, head and MTP blocks stay.
        experts: keep only this many routed experts a layer.
        tiny: small dimensions and five layers, with every structural feature of the release.
        mtp: False leaves the MTP blocks out.
        vocab: how many tokens; by default few where it is tiny, else all.

    Returns:
        The parsed config.json, and the scheme that the release is stored under.

    Raises:
        UsageError: if like names no release, or layers or experts are not within what the release has.
    """
    if like not in set(Like):
        raise UsageError(f"like is {like!r}, expected one of {', '.join(Like)}", hint="See: v4quant synth --help")
    release = Like(like)
    config = _released_config(release)
    if tiny:
        _shrink(config, _TINY_PRO if release.value.startswith("pro") else _TINY)
        _keep_layers(config, _TINY_LAYERS)
    if vocab is Vocab.SMALL or (vocab is None and tiny):
        _keep_tokens(config, _SMALL_VOCAB)
    if layers is not None:
        _require_within("layers", layers, config["num_hidden_layers"])
        _keep_layers(config, layers)
    if experts is not None:
        _require_within("experts", experts, config["n_routed_experts"])
        config["n_routed_experts"] = experts
        config["num_experts_per_tok"] = min(config["num_experts_per_tok"], experts)
    if not mtp:
        _drop_mtp(config)
    return config, BASE_SCHEME if release.is_base else NATIVE_SCHEME


def inference_config(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """Say the same as config.json in the flat form that DeepSeek's inference code reads (inference/config.json).

    Args:
        config_json: a parsed config.json with an FP8 quantization_config.
    """
    flat = {key: _lookup(config_json, path) for key, path in _INFERENCE_KEYS.items()}
    if "dspark_markov_rank" in config_json:
        flat["n_mtp_layers"] = len(config_json["compress_ratios"]) - config_json["num_hidden_layers"]
        flat |= {key: config_json[key] for key in _DSPARK_KEYS}
    return flat


def _released_config(release: Like) -> dict[str, Any]:
    file_name = f"{release.removesuffix('-base')}.json"
    text = (resources.files("v4quant.testing") / "configs" / file_name).read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    if release.is_base:
        config["expert_dtype"] = "fp8"
    return config


def _shrink(config: dict[str, Any], dimensions: Mapping[str, int]) -> None:
    config.update(dimensions)
    if "dspark_markov_rank" in config:
        config.update(_TINY_DSPARK)


def _require_within(option: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise UsageError(f"{option} is {value}, expected 1 to {most}", hint="Leave the option out to keep all of them.")


def _keep_layers(config: dict[str, Any], layers: int) -> None:
    """Cut the trunk to its first layers; the trailing ratios, those of the MTP blocks, stay."""
    ratios = config["compress_ratios"]
    config["compress_ratios"] = ratios[:layers] + ratios[config["num_hidden_layers"] :]
    config["num_hidden_layers"] = layers
    config["num_hash_layers"] = min(config["num_hash_layers"], layers)
    if "dspark_target_layer_ids" in config:
        # The releases feed the last three layers to DSpark; a shorter trunk repeats its first layer instead.
        count = len(config["dspark_target_layer_ids"])
        config["dspark_target_layer_ids"] = [max(0, layers - count + i) for i in range(count)]


def _keep_tokens(config: dict[str, Any], tokens: int) -> None:
    config["vocab_size"] = tokens
    if "dspark_noise_token_id" in config:
        config["dspark_noise_token_id"] = tokens - 1


def _drop_mtp(config: dict[str, Any]) -> None:
    config["compress_ratios"] = config["compress_ratios"][: config["num_hidden_layers"]]
    config["num_nextn_predict_layers"] = 0
    for key in _DSPARK_KEYS:
        config.pop(key, None)


def _lookup(config_json: Mapping[str, Any], path: str) -> Any:
    value: Any = config_json
    for key in path.split("."):
        value = value[key]
    return value
