"""V4Config: the part of a DeepSeek-V4 config.json that decides which tensors exist, how large and how stored.

The file is hostile input: every value is checked for type and range before anything is computed from it, so that an
inventory made from it fits in memory, and each error names the key, what was expected and what was found.
Source of keys and values: config.json of the April 2026, 0731 and 0813 releases.
"""

from dataclasses import dataclass
from typing import Any

from v4quant import strict_json
from v4quant.config_keys import HINT_RELEASE, Keys, show
from v4quant.encodings import BF16_SCHEME, NATIVE_SCHEME, Scheme
from v4quant.errors import UsageError

CONFIG_NAME = "config.json"
INFERENCE_CONFIG_NAME = "inference/config.json"  # of DeepSeek's own code
# A release's config.json has under 4 KB.
MAX_CONFIG_BYTES = 2**20
MAX_MTP_BLOCKS = 8
# Pro-0813 has 64 blocks of 384 experts: 24,576, the most of any release. Each is six stored tensors.
MAX_ROUTED_EXPERTS_IN_ALL = 65_536

# Columns of a matrix: memory is bounded by 128 rows of it. Pro has 65,536, the most of any release.
MAX_WIDTH = 2**18

EXPERT_DTYPES = ("fp4", "fp8", "bf16")
COMPRESS_RATIOS = (0, 4, 128)  # sliding window only, CSA, HCA
FP4_BLOCK_COLUMNS = 32

# Key -> smallest and largest value accepted; the largest are far above any release.
_INTEGERS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, 2**22),
    "hidden_size": (1, 2**17),
    "moe_intermediate_size": (1, 2**17),
    "num_hidden_layers": (1, 1024),
    "num_hash_layers": (0, 1024),
    "num_attention_heads": (1, 4096),
    "n_routed_experts": (1, 65_536),
    "num_experts_per_tok": (1, 65_536),
    "q_lora_rank": (1, 2**16),
    "o_lora_rank": (1, 2**16),
    "o_groups": (1, 4096),
    "head_dim": (1, 2**14),
    "qk_rope_head_dim": (1, 2**14),
    "index_n_heads": (1, 4096),
    "index_head_dim": (1, 2**14),
    "index_topk": (1, 2**24),
    "hc_mult": (1, 64),
    "sliding_window": (1, 2**24),
    "num_nextn_predict_layers": (0, MAX_MTP_BLOCKS),
    "hc_sinkhorn_iters": (1, 1000),
    "max_position_embeddings": (1, 2**30),
}
# Keys of the arithmetic that have one value in every release, and no other that v4quant would run.
_FIXED = {
    "qk_rope_head_dim": 64,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
}
# Positive numbers of the arithmetic.
_NUMBERS = ("swiglu_limit", "routed_scaling_factor", "rms_norm_eps", "hc_eps", "rope_theta", "compress_rope_theta")
_HINT_SUPPORTED = "v4quant converts DeepSeek-V4 Flash and Pro, their Base models, Flash-0731 and Pro-0813."


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """The `quantization_config` object: FP8 E4M3 weights under 128x128 block scales, in every release.

    Attributes:
        weight_block_size: rows and columns under one FP8 scale; always 128, 128.
        scale_fmt: "ue8m0", "float", or None where the key is absent. The Base releases say "ue8m0" and store F32:
            tell the scale's dtype from headers.
        activation_scheme: "dynamic", or None where the key is absent.
    """

    weight_block_size: tuple[int, int]
    scale_fmt: str | None
    activation_scheme: str | None


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The `rope_scaling` object: YaRN, on layers with a compressor only."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, slots=True)
class V4Config:
    """Dimensions and storage of a DeepSeek-V4 model, under the names of config.json.

    Attributes (those that do not speak for themselves):
        compress_ratios: one a block, MTP blocks last: 0 sliding window only, 4 CSA, 128 HCA.
        num_nextn_predict_layers: as the file says; 1 even in releases with three MTP blocks. Use mtp_blocks.
        expert_dtype: "fp4", "fp8", "bf16", or None where the file does not say.
        quantization_config: None where nothing is quantised.
        dspark_markov_rank: rank of the Markov tables of a DSpark release; None in others.
        dspark_target_layer_ids: layers whose hidden states feed the first DSpark stage; () in others.
    """

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_hash_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    head_dim: int
    qk_rope_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    hc_mult: int
    sliding_window: int
    num_nextn_predict_layers: int
    n_shared_experts: int
    hc_sinkhorn_iters: int
    max_position_embeddings: int
    swiglu_limit: float
    routed_scaling_factor: float
    rms_norm_eps: float
    hc_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling
    compress_ratios: tuple[int, ...]
    expert_dtype: str | None
    quantization_config: QuantizationConfig | None
    dspark_markov_rank: int | None
    dspark_target_layer_ids: tuple[int, ...]

    @property
    def mtp_blocks(self) -> int:
        """MTP blocks in the checkpoint, told by the length of compress_ratios."""
        return len(self.compress_ratios) - self.num_hidden_layers

    @property
    def is_dspark(self) -> bool:
        """True where the MTP blocks are DSpark stages, as in Flash-0731 and Pro-0813."""
        return self.dspark_markov_rank is not None

    @property
    def declared_scheme(self) -> Scheme | None:
        """The storage that config.json declares; None where it leaves open which FP8 form is stored.

        FP8 experts have E8M0 scales or, in the Base releases, F32 scales, and the key may be missing: only headers
        tell. Without quantization_config nothing is quantised.
        """
        if self.quantization_config is None:
            return BF16_SCHEME
        return NATIVE_SCHEME if self.expert_dtype == "fp4" else None

    @classmethod
    def load(cls, text: str | bytes, where: str) -> "V4Config":
        """Read the text of a config.json.

        Args:
            text: the whole file.
            where: what to call the file in errors.

        Raises:
            UsageError: if the text is no JSON, or for a reason of from_json.
        """
        return cls.from_json(parse_config_json(text, where), where)

    @classmethod
    def from_json(cls, data: object, where: str) -> "V4Config":
        """Check a parsed config.json and keep what describes the checkpoint.

        Raises:
            UsageError: if it is not the config of a V4 text model, or a key is missing, of the wrong type, out of
                range, or contradicts another.
        """
        keys = Keys(data, where)
        _require_v4_text_model(keys)
        integers = {key: keys.integer(key, *bounds) for key, bounds in _INTEGERS.items()}
        numbers: dict[str, Any] = {key: keys.number(key) for key in _NUMBERS}
        quantization_config = _quantization_config(keys)
        markov_rank, target_layer_ids = _dspark(keys, integers["num_hidden_layers"])
        config = cls(
            **integers,
            n_shared_experts=keys.integer("n_shared_experts", 1, 1),
            **numbers,
            rope_scaling=_rope_scaling(keys),
            compress_ratios=_compress_ratios(keys, integers["num_hidden_layers"]),
            expert_dtype=_expert_dtype(keys, quantized=quantization_config is not None),
            quantization_config=quantization_config,
            dspark_markov_rank=markov_rank,
            dspark_target_layer_ids=target_layer_ids,
        )
        _require_consistent(config, keys)
        return config


def parse_config_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse the text of a config.json strictly: an object, no duplicate keys, only finite numbers.

    Args:
        text: the whole file; bytes must be UTF-8.
        where: what to call the file in errors.

    Raises:
        UsageError: if the text is too long or is not such JSON.
    """
    if len(text) > MAX_CONFIG_BYTES:
        raise UsageError(
            f"{where} has {len(text):,} bytes, expected a config.json of at most {MAX_CONFIG_BYTES:,}",
            hint=HINT_RELEASE,
        )
    try:
        data = strict_json.parse(text)
    except ValueError as error:
        raise UsageError(f"{where} is not valid JSON: {error}", hint=HINT_RELEASE) from None
    if not isinstance(data, dict):
        raise UsageError(f"{where} holds {show(data)}, expected a JSON object", hint=HINT_RELEASE)
    return data


def _require_v4_text_model(keys: Keys) -> None:
    model_type = keys.get("model_type")
    text_config = keys.get("text_config")
    nested = text_config.get("model_type") if isinstance(text_config, dict) else None
    if any(isinstance(found, str) and found.startswith("deepseek_v41") for found in (model_type, nested)):
        raise UsageError(
            f"{keys.where}: DeepSeek-V4.1 (model_type deepseek_v41) is recognised but not supported: it has FP8 "
            "blocks of 32x32, engram tables and a vision tower; expected model_type deepseek_v4",
            hint=_HINT_SUPPORTED,
        )
    vision = sorted(key for key in keys.data if key.startswith("vision_"))
    if model_type == "deepseek_v4" and vision:
        raise UsageError(
            f"{keys.where}: DeepSeek-V4-Flash-Vision-Exp is recognised but not supported: key {show(vision[0])} "
            "announces a vision tower and its aligner, expected a text model without vision_* keys",
            hint=_HINT_SUPPORTED,
        )
    if model_type is None and "dim" in keys.data and "n_layers" in keys.data:
        raise UsageError(
            f"{keys.where}: this is the config of DeepSeek's inference code (keys dim, n_layers), expected the "
            "Hugging Face config.json (keys model_type, hidden_size, num_hidden_layers)",
            hint="Use the config.json that lies beside the *.safetensors files, not the one in inference/.",
        )
    if model_type != "deepseek_v4":
        keys.wrong("model_type", "'deepseek_v4'", "v4quant reads DeepSeek-V4 checkpoints only.")


def _quantization_config(keys: Keys) -> QuantizationConfig | None:
    if keys.get("quantization_config") is None:
        return None
    inner = Keys(keys.get("quantization_config"), keys.where, "quantization_config.")
    for key in ("moe_quant_algo", "quant_algo"):
        if inner.get(key) is not None:
            inner.wrong(key, "no such key", "NVFP4 and mixed-precision checkpoints are not supported as a source.")
    if inner.get("quant_method") != "fp8":
        inner.wrong("quant_method", "'fp8'", "v4quant reads the native, fp8, Base and bf16 forms of V4.")
    inner.choice("fmt", ("e4m3",))
    block = inner.integers("weight_block_size", range(1, 2**17), "a size")
    if block != (128, 128):
        inner.wrong("weight_block_size", "[128, 128]", "Every V4 release has FP8 blocks of 128x128.")
    return QuantizationConfig(
        weight_block_size=(128, 128),
        scale_fmt=inner.choice("scale_fmt", ("ue8m0", "float")),
        activation_scheme=inner.choice("activation_scheme", ("dynamic",)),
    )


def _rope_scaling(keys: Keys) -> RopeScaling:
    inner = Keys(keys.get("rope_scaling"), keys.where, "rope_scaling.")
    kind = inner.get("type") or inner.get("rope_type")
    if kind != "yarn":
        inner.wrong("type", "'yarn'")
    return RopeScaling(
        factor=inner.number("factor"),
        original_max_position_embeddings=inner.integer("original_max_position_embeddings", 1, 2**30),
        beta_fast=inner.number("beta_fast"),
        beta_slow=inner.number("beta_slow"),
    )


def _expert_dtype(keys: Keys, *, quantized: bool) -> str | None:
    """The experts' storage, from the top-level key or from quantization_config, where transformers moves it."""
    outer = keys.choice("expert_dtype", EXPERT_DTYPES)
    if not quantized:
        if outer in ("fp4", "fp8"):
            keys.wrong(
                "expert_dtype",
                "'bf16' or no such key, as there is no quantization_config",
                "Restore quantization_config from the release, or remove expert_dtype if every weight is BF16.",
            )
        return outer
    inner = Keys(keys.get("quantization_config"), keys.where, "quantization_config.")
    moved = inner.choice("expert_dtype", EXPERT_DTYPES)
    if moved is not None and outer is not None and moved != outer:
        inner.wrong("expert_dtype", f"{show(outer)}, as the top-level expert_dtype says")
    if (outer or moved) == "bf16":
        (inner if outer is None else keys).wrong(
            "expert_dtype",
            "'fp4', 'fp8' or no such key, as there is a quantization_config",
            "Remove quantization_config if every weight is BF16.",
        )
    return outer or moved


def _compress_ratios(keys: Keys, layers: int) -> tuple[int, ...]:
    ratios = keys.integers("compress_ratios", COMPRESS_RATIOS, "0, 4 or 128")
    if not layers <= len(ratios) <= layers + MAX_MTP_BLOCKS:
        raise UsageError(
            f"{keys.where}: compress_ratios has {len(ratios)} elements, expected num_hidden_layers = {layers} and one "
            f"for each MTP block, of which there are 0 to {MAX_MTP_BLOCKS}",
            hint=HINT_RELEASE,
        )
    if any(ratios[layers:]):
        raise UsageError(
            f"{keys.where}: compress_ratios ends in {list(ratios[layers:])}, expected only 0 after the first "
            f"num_hidden_layers = {layers}: MTP blocks have no compressor",
            hint=HINT_RELEASE,
        )
    return ratios


def _dspark(keys: Keys, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Rank of the Markov tables and target layers; None and () where the release is no DSpark one."""
    if keys.get("dspark_markov_rank") is None and keys.get("dspark_target_layer_ids") is None:
        return None, ()
    rank = keys.integer("dspark_markov_rank", 1, 2**16)
    targets = keys.integers("dspark_target_layer_ids", range(layers), f"a layer number from 0 to {layers - 1}")
    if not 1 <= len(targets) <= 16:
        keys.wrong("dspark_target_layer_ids", "1 to 16 layer numbers")
    return rank, targets


def _require_consistent(config: V4Config, keys: Keys) -> None:
    """Check what single keys cannot show: divisions without a rest, one number within another, total size."""
    for key in ("hidden_size", "moe_intermediate_size"):
        if keys.data[key] % FP4_BLOCK_COLUMNS:
            keys.wrong(key, f"a multiple of {FP4_BLOCK_COLUMNS}, the columns under one FP4 scale")
    if config.num_attention_heads * config.head_dim % config.o_groups:
        product = config.num_attention_heads * config.head_dim
        keys.wrong("o_groups", f"a divisor of num_attention_heads * head_dim = {product}")
    for key, limit in (
        ("num_experts_per_tok", "n_routed_experts"),
        ("num_hash_layers", "num_hidden_layers"),
        ("qk_rope_head_dim", "head_dim"),
    ):
        if keys.data[key] > keys.data[limit]:
            keys.wrong(key, f"at most {limit} = {keys.data[limit]}")
    for keys_of_width, width in (
        ("num_attention_heads * head_dim", config.num_attention_heads * config.head_dim),
        ("o_groups * o_lora_rank", config.o_groups * config.o_lora_rank),
        ("dspark_target_layer_ids * hidden_size", len(config.dspark_target_layer_ids) * config.hidden_size),
    ):
        if width > MAX_WIDTH:
            raise UsageError(
                f"{keys.where}: {keys_of_width} is {width:,}, expected at most {MAX_WIDTH:,}", hint=HINT_RELEASE
            )
    blocks = len(config.compress_ratios)
    if config.n_routed_experts * blocks > MAX_ROUTED_EXPERTS_IN_ALL:
        keys.wrong("n_routed_experts", f"at most {MAX_ROUTED_EXPERTS_IN_ALL // blocks:,} in each of {blocks} blocks")
    if config.is_dspark and config.mtp_blocks == 0:
        keys.wrong("compress_ratios", "entries for the MTP blocks that dspark_markov_rank announces")
    for key, value in _FIXED.items():
        if keys.get(key) is not None and keys.get(key) != value:
            keys.wrong(key, f"{show(value)}, as in every release")
    if keys.get("tie_word_embeddings") not in (None, False):
        keys.wrong("tie_word_embeddings", "false: V4 stores a head of its own")
    if keys.get("num_key_value_heads") is not None:
        keys.integer("num_key_value_heads", 1, 1)
