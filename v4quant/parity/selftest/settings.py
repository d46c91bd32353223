"""Corruptions of config.json: right weights that compute something else, or a storage that is not what it says."""

from collections.abc import Callable
from typing import Any

from v4quant.checkpoint.reader import Checkpoint
from v4quant.parity.selftest.corruption import Corruption, needs
from v4quant.parity.selftest.editor import Editor

_NO_CLAMP = 1e6
_QUANTIZATION_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}


def _set(**values: Any) -> Callable[[Editor], None]:
    """Set keys of config.json."""
    return lambda editor: editor.config.update(values)


def _remove(key: str) -> Callable[[Editor], None]:
    return lambda editor: editor.config.pop(key)


def _plus(key: str, amount: int) -> Callable[[Editor], None]:
    """Add to a number of config.json."""

    def apply(editor: Editor) -> None:
        editor.config[key] += amount

    return apply


def _times(factor: int, *keys: str) -> Callable[[Editor], None]:
    def apply(editor: Editor) -> None:
        editor.config.update({key: editor.config[key] * factor for key in keys})

    return apply


def _needs_more_than(key: str, least: int) -> Callable[[Checkpoint], str]:
    return lambda checkpoint: "" if getattr(checkpoint.config, key) > least else f"{key} is {least}"


def _bases_exchanged(editor: Editor) -> None:
    config = editor.config
    config["rope_theta"], config["compress_rope_theta"] = config["compress_rope_theta"], config["rope_theta"]


def _needs_compression(checkpoint: Checkpoint) -> str:
    return "" if any(checkpoint.config.compress_ratios) else "no layer has a compressor"


def _in_yarn(key: str, value: float) -> Callable[[Editor], None]:
    def apply(editor: Editor) -> None:
        editor.config["rope_scaling"][key] = value

    return apply


def _ratios_exchanged(editor: Editor) -> None:
    other = {4: 128, 128: 4, 0: 0}
    editor.config["compress_ratios"] = [other[ratio] for ratio in editor.config["compress_ratios"]]


def _needs_quantised(checkpoint: Checkpoint) -> str:
    return "" if checkpoint.config.quantization_config else "bf16 has no quantization_config"


def _expert_dtype_wrong(editor: Editor) -> None:
    editor.config["expert_dtype"] = "fp8" if editor.checkpoint.scheme.expert.name == "fp4" else "fp4"


def _scale_label_lost(editor: Editor) -> None:
    del editor.config["quantization_config"]["scale_fmt"]


def _needs_scale_label(checkpoint: Checkpoint) -> str:
    quantization = checkpoint.config.quantization_config
    if checkpoint.scheme.dense.scale_dtype != "F8_E8M0":
        return "no scale is stored as E8M0"
    return "" if quantization and quantization.scale_fmt else "no scale_fmt in config.json"


def _needs_key(key: str) -> Callable[[Checkpoint], str]:
    return lambda checkpoint: "" if key in checkpoint.config_json else f"no {key} in config.json"


def _eos_changed(editor: Editor) -> None:
    editor.config["eos_token_id"] = 2 if editor.config["eos_token_id"] != 2 else 1


CORRUPTIONS = (
    Corruption(
        "rope-bases-exchanged",
        "RoPE bases of window-only and of compressed layers were exchanged.",
        _bases_exchanged,
        _needs_compression,
    ),
    Corruption("rope-theta-wrong", "rope_theta has another model's value.", _set(rope_theta=1_000_000)),
    Corruption(
        "yarn-factor-lost",
        "YaRN's factor is 1, as in a config rewritten for short contexts: compressed layers rotate too fast.",
        _in_yarn("factor", 1),
        _needs_compression,
    ),
    Corruption(
        "yarn-length-wrong",
        "YaRN's original length has the value of DeepSeek-V3.",
        _in_yarn("original_max_position_embeddings", 4096),
        _needs_compression,
    ),
    Corruption(
        "swiglu-limit-lost",
        "swiglu_limit was dropped from config.json; loaders then clamp nothing (sglang#23776, vllm#45859).",
        _remove("swiglu_limit"),
    ),
    Corruption(
        "swiglu-limit-off",
        "swiglu_limit is so large that nothing is clamped (Pro gained 3 to 4 points of accuracy when this was fixed).",
        _set(swiglu_limit=_NO_CLAMP),
    ),
    Corruption(
        "routed-scaling-lost",
        "routed_scaling_factor is 1: routed experts count too little beside the shared one.",
        _set(routed_scaling_factor=1.0),
        lambda checkpoint: "" if checkpoint.config.routed_scaling_factor != 1 else "routed_scaling_factor is 1",
    ),
    Corruption("window-off-by-one", "The sliding window is one token longer.", _plus("sliding_window", 1)),
    Corruption(
        "index-topk-off-by-one",
        "The indexer picks one entry less.",
        _plus("index_topk", -1),
        lambda checkpoint: (
            _needs_more_than("index_topk", 1)(checkpoint)
            or needs("no layer has an indexer", "attn.indexer.weights_proj")(checkpoint)
        ),
    ),
    Corruption(
        "sinkhorn-once",
        "The hyper-connections are normalised once instead of twenty times.",
        _set(hc_sinkhorn_iters=1),
        _needs_more_than("hc_sinkhorn_iters", 1),
    ),
    Corruption("rms-norm-eps-wrong", "rms_norm_eps is 1e-5 instead of 1e-6.", _set(rms_norm_eps=1e-5)),
    Corruption(
        "hash-layers-forgotten",
        "num_hash_layers is 0: every layer is routed by score.",
        _set(num_hash_layers=0),
        _needs_more_than("num_hash_layers", 0),
    ),
    Corruption(
        "compress-ratios-exchanged",
        "Compression ratios 4 and 128 were exchanged in config.json.",
        _ratios_exchanged,
        _needs_compression,
    ),
    Corruption(
        "picks-off-by-one",
        "num_experts_per_tok is one less than the model was trained with.",
        _plus("num_experts_per_tok", -1),
        _needs_more_than("num_experts_per_tok", 1),
    ),
    Corruption(
        "config-of-another-model",
        "config.json is that of a larger sibling (vllm#40790: Flash and Pro mixed up).",
        _times(2, "num_attention_heads", "moe_intermediate_size"),
    ),
    Corruption(
        "quantization-config-lost",
        "quantization_config was removed though weights are quantised (unsloth#4919).",
        _remove("quantization_config"),
        _needs_quantised,
    ),
    Corruption(
        "quantization-config-left",
        "quantization_config was left in place after the weights became BF16 (sglang#7593).",
        _set(quantization_config=_QUANTIZATION_CONFIG),
        lambda checkpoint: "weights are quantised" if checkpoint.config.quantization_config else "",
    ),
    Corruption(
        "expert-dtype-wrong",
        "expert_dtype says another form than the one stored (sglang#23602, VeOmni#1089).",
        _expert_dtype_wrong,
    ),
    Corruption(
        "scale-label-lost",
        "quantization_config lost scale_fmt ue8m0, so loaders may round the scales again (sglang#38446).",
        _scale_label_lost,
        _needs_scale_label,
    ),
    Corruption(
        "mtp-not-announced",
        "num_nextn_predict_layers is 0 though the MTP block is stored; loaders then leave it out.",
        _set(num_nextn_predict_layers=0),
        _needs_more_than("num_nextn_predict_layers", 0),
    ),
    Corruption(
        "eos-changed",
        "eos_token_id is another token: the model never stops, or stops early.",
        _eos_changed,
        _needs_key("eos_token_id"),
    ),
    Corruption(
        "torch-dtype-float16",
        "torch_dtype says float16, which loaders cast to: BF16 values beyond 65504 become infinite.",
        _set(torch_dtype="float16"),
        _needs_key("torch_dtype"),
    ),
)
