"""Real configs load; every wrong one is refused with a message that names the key, what was expected and found."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4quant.config import MAX_CONFIG_BYTES, V4Config, parse_config_json
from v4quant.encodings import BF16_SCHEME, NATIVE_SCHEME, Scheme
from v4quant.errors import UsageError
from v4quant.inventory import logical_tensors

DATA = Path(__file__).parent / "data"
FLASH_TEXT = (DATA / "configs" / "flash.json").read_text(encoding="utf-8")
ABSENT = object()


def changed(**changes: Any) -> dict[str, Any]:
    """Flash's config with keys set, or removed where the value is ABSENT."""
    data: dict[str, Any] = json.loads(FLASH_TEXT) | changes
    return {key: value for key, value in data.items() if value is not ABSENT}


def quantization(**changes: Any) -> dict[str, Any]:
    """Flash's quantization_config with keys set or removed."""
    data: dict[str, Any] = json.loads(FLASH_TEXT)["quantization_config"] | changes
    return {key: value for key, value in data.items() if value is not ABSENT}


def refusal(data: object) -> str:
    """The message and hint with which a parsed config is refused."""
    with pytest.raises(UsageError) as caught:
        V4Config.from_json(data, "config.json")
    return checked(caught.value)


def text_refusal(text: str | bytes) -> str:
    """The message and hint with which a config's text is refused."""
    with pytest.raises(UsageError) as caught:
        V4Config.load(text, "config.json")
    return checked(caught.value)


def checked(error: UsageError) -> str:
    message = str(error)
    assert message.startswith("config.json")
    assert error.hint
    assert error.exit_code == 2
    assert len(message) < 400
    assert message.isascii()
    assert message.isprintable()
    return f"{message} | {error.hint}"


def test_flash() -> None:
    config = V4Config.load(FLASH_TEXT, "flash.json")
    assert (config.hidden_size, config.num_hidden_layers, config.n_routed_experts) == (4096, 43, 256)
    assert config.compress_ratios == (0, 0, *(4, 128) * 20, 4, 0)
    assert (config.mtp_blocks, config.is_dspark, config.dspark_target_layer_ids) == (1, False, ())
    assert (config.swiglu_limit, config.routed_scaling_factor) == (10.0, 1.5)
    assert (config.expert_dtype, config.declared_scheme) == ("fp4", NATIVE_SCHEME)
    assert config.quantization_config is not None
    assert config.quantization_config.weight_block_size == (128, 128)
    assert config.quantization_config.scale_fmt == "ue8m0"


@pytest.mark.parametrize(
    ("path", "layers", "mtp_blocks", "rank", "targets"),
    [
        ("configs/pro.json", 61, 1, None, ()),
        ("configs/flash-0731.json", 43, 3, 256, (40, 41, 42)),
        ("configs/pro-0813.json", 61, 3, 512, (58, 59, 60)),
        ("reference/tiny-flash/config.json", 5, 1, None, ()),
        ("reference/tiny-base/config.json", 3, 1, None, ()),
    ],
)
def test_released_configs(path: str, layers: int, mtp_blocks: int, rank: int | None, targets: tuple[int, ...]) -> None:
    config = V4Config.load((DATA / path).read_bytes(), path)
    assert (config.num_hidden_layers, config.mtp_blocks, config.num_nextn_predict_layers) == (layers, mtp_blocks, 1)
    assert (config.dspark_markov_rank, config.dspark_target_layer_ids) == (rank, targets)
    assert config.is_dspark == (rank is not None)


@pytest.mark.parametrize(
    ("expert_dtype", "quantization_config", "expected", "scheme"),
    [
        ("fp4", quantization(), "fp4", NATIVE_SCHEME),
        (ABSENT, quantization(expert_dtype="fp4"), "fp4", NATIVE_SCHEME),
        ("fp4", quantization(expert_dtype="fp4"), "fp4", NATIVE_SCHEME),
        ("fp8", quantization(), "fp8", None),
        (ABSENT, quantization(), None, None),
        (None, quantization(), None, None),
        ("fp8", quantization(scale_fmt="float", fmt=ABSENT, activation_scheme=ABSENT), "fp8", None),
        ("bf16", ABSENT, "bf16", BF16_SCHEME),
        (ABSENT, None, None, BF16_SCHEME),
    ],
)
def test_declared_scheme(
    expert_dtype: object, quantization_config: object, expected: str | None, scheme: Scheme | None
) -> None:
    data = changed(expert_dtype=expert_dtype, quantization_config=quantization_config)
    config = V4Config.from_json(data, "config.json")
    assert (config.expert_dtype, config.declared_scheme) == (expected, scheme)


INTEGER_KEYS = [
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_hash_layers",
    "num_attention_heads",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "head_dim",
    "qk_rope_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "hc_mult",
    "sliding_window",
    "num_nextn_predict_layers",
]
FOUND = [
    (ABSENT, "is missing"),
    (None, "is null"),
    (True, "is true"),
    (False, "is false"),
    (4096.0, "is 4096.0"),
    ("4096", "is '4096'"),
    (-1, "is -1"),
    (2**31, "is 2147483648"),
    (10**400, "is an integer of 1329 bits"),
    ([4096], "is [4096]"),
    ([[4096]], "is an array of 1 elements"),
    ({"a": 1}, "is an object of 1 keys"),
]


@pytest.mark.parametrize("key", INTEGER_KEYS)
def test_integers_are_checked_for_type_and_range(key: str) -> None:
    for value, found in FOUND:
        message = refusal(changed(**{key: value}))
        assert f"config.json: {key} {found}, expected " in message


@pytest.mark.parametrize(
    "key", [key for key in INTEGER_KEYS if key not in ("num_hash_layers", "num_nextn_predict_layers")]
)
def test_zero_is_refused_where_it_makes_no_sense(key: str) -> None:
    assert f"config.json: {key} is 0, expected " in refusal(changed(**{key: 0}))


def test_no_hash_layers_and_no_mtp_are_allowed() -> None:
    ratios = json.loads(FLASH_TEXT)["compress_ratios"][:43]
    config = V4Config.from_json(
        changed(num_hash_layers=0, num_nextn_predict_layers=0, compress_ratios=ratios), "config.json"
    )
    assert (config.num_hash_layers, config.mtp_blocks) == (0, 0)


@pytest.mark.parametrize("key", ["swiglu_limit", "routed_scaling_factor"])
@pytest.mark.parametrize("value", [ABSENT, None, True, "1.5", 0, -1.0, 1e300, 10**400, float("nan"), float("inf"), [1]])
def test_numbers_are_checked(key: str, value: object) -> None:
    assert f"config.json: {key} is " in refusal(changed(**{key: value}))


RATIOS = json.loads(FLASH_TEXT)["compress_ratios"]

# Changes to Flash's config, and what the refusal must say.
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"model_type": "llama"}, ["model_type is 'llama', expected 'deepseek_v4'"]),
    ({"model_type": "deepseek_v3"}, ["model_type is 'deepseek_v3'"]),
    ({"model_type": ABSENT}, ["model_type is missing"]),
    ({"model_type": ["deepseek_v4"]}, ["model_type is ['deepseek_v4']"]),
    ({"model_type": "\x1b[31m\x7f"}, [r"model_type is '\x1b[31m\x7f'"]),
    ({"model_type": "x" * 100_000}, ["model_type is 'xxxx", "..."]),
    ({"model_type": "deepseek_v41"}, ["V4.1", "recognised but not supported", "32x32", "engram"]),
    ({"text_config": {"model_type": "deepseek_v41_text"}}, ["V4.1", "recognised but not supported"]),
    ({"vision_n_layers": 32, "vision_dim": 1024}, ["Vision-Exp", "recognised but not supported", "vision_dim"]),
    ({"expert_dtype": "int4"}, ["expert_dtype is 'int4', expected one of fp4, fp8, bf16"]),
    ({"expert_dtype": "FP4"}, ["expert_dtype is 'FP4'"]),
    ({"expert_dtype": 4}, ["expert_dtype is 4"]),
    ({"expert_dtype": ["fp4"]}, ["expert_dtype is ['fp4']"]),
    ({"expert_dtype": "bf16"}, ["expert_dtype is 'bf16'", "there is a quantization_config"]),
    ({"quantization_config": ABSENT}, ["expert_dtype is 'fp4'", "no quantization_config"]),
    ({"quantization_config": None, "expert_dtype": "fp8"}, ["expert_dtype is 'fp8'", "no quantization_config"]),
    ({"quantization_config": False}, ["quantization_config is false, expected a JSON object"]),
    ({"quantization_config": []}, ["quantization_config is [], expected a JSON object"]),
    ({"quantization_config": {}}, ["quantization_config.quant_method is missing, expected 'fp8'"]),
    ({"quantization_config": quantization(quant_method="awq")}, ["quantization_config.quant_method is 'awq'"]),
    ({"quantization_config": quantization(fmt="e5m2")}, ["quantization_config.fmt is 'e5m2', expected one of e4m3"]),
    ({"quantization_config": quantization(scale_fmt="fp16")}, ["scale_fmt is 'fp16'", "ue8m0, float"]),
    ({"quantization_config": quantization(activation_scheme="static")}, ["activation_scheme is 'static'", "dynamic"]),
    ({"quantization_config": quantization(weight_block_size=[32, 32])}, ["size is [32, 32]", "[128, 128]"]),
    ({"quantization_config": quantization(weight_block_size=[128])}, ["weight_block_size is [128]"]),
    ({"quantization_config": quantization(weight_block_size=[128.0, 128])}, ["weight_block_size[0] is 128.0"]),
    ({"quantization_config": quantization(weight_block_size=[128, True])}, ["weight_block_size[1] is true"]),
    ({"quantization_config": quantization(weight_block_size=128)}, ["weight_block_size is 128"]),
    ({"quantization_config": quantization(weight_block_size=ABSENT)}, ["weight_block_size is missing"]),
    ({"quantization_config": quantization(moe_quant_algo="NVFP4")}, ["moe_quant_algo is 'NVFP4'"]),
    ({"quantization_config": quantization(quant_algo="MIXED_PRECISION")}, ["quant_algo is 'MIXED_PRECISION'"]),
    ({"quantization_config": quantization(expert_dtype="fp8")}, ["quantization_config.expert_dtype is 'fp8'", "'fp4'"]),
    ({"quantization_config": quantization(expert_dtype="int4")}, ["quantization_config.expert_dtype is 'int4'"]),
    (
        {"quantization_config": quantization(expert_dtype="bf16"), "expert_dtype": ABSENT},
        ["quantization_config.expert_dtype is 'bf16'"],
    ),
    ({"compress_ratios": ABSENT}, ["compress_ratios is missing"]),
    ({"compress_ratios": "0" * 44}, ["compress_ratios is '000"]),
    ({"compress_ratios": {"0": 0}}, ["compress_ratios is an object"]),
    ({"compress_ratios": RATIOS[:42]}, ["compress_ratios has 42 elements", "43"]),
    ({"compress_ratios": RATIOS + [0] * 8}, ["compress_ratios has 52 elements"]),
    ({"compress_ratios": [0] * 100_000}, ["compress_ratios has 100000 elements"]),
    ({"compress_ratios": [2, *RATIOS[1:]]}, ["compress_ratios[0] is 2, expected 0, 4 or 128"]),
    ({"compress_ratios": [False, *RATIOS[1:]]}, ["compress_ratios[0] is false"]),
    ({"compress_ratios": [4.0, *RATIOS[1:]]}, ["compress_ratios[0] is 4.0"]),
    ({"compress_ratios": [*RATIOS[:-1], 4]}, ["compress_ratios ends in [4]", "MTP"]),
    ({"hidden_size": 4100}, ["hidden_size is 4100, expected a multiple of 32"]),
    ({"moe_intermediate_size": 2047}, ["moe_intermediate_size is 2047, expected a multiple of 32"]),
    ({"o_groups": 7}, ["o_groups is 7, expected a divisor of num_attention_heads * head_dim = 32768"]),
    ({"num_experts_per_tok": 257}, ["num_experts_per_tok is 257, expected at most n_routed_experts = 256"]),
    ({"num_hash_layers": 44}, ["num_hash_layers is 44, expected at most num_hidden_layers = 43"]),
    ({"qk_rope_head_dim": 513}, ["qk_rope_head_dim is 513, expected at most head_dim = 512"]),
    ({"n_routed_experts": 1490}, ["n_routed_experts is 1490, expected at most 1,489 in each of 44 blocks"]),
    ({"n_shared_experts": 2}, ["n_shared_experts is 2, expected 1"]),
    ({"qk_rope_head_dim": 32}, ["qk_rope_head_dim is 32, expected 64, as in every release"]),
    ({"scoring_func": "softmax"}, ["scoring_func is", "softmax", "sqrtsoftplus"]),
    ({"norm_topk_prob": False}, ["norm_topk_prob is false, expected true"]),
    ({"topk_method": "greedy"}, ["topk_method is", "noaux_tc"]),
    ({"hidden_act": "gelu"}, ["hidden_act is", "silu"]),
    ({"attention_bias": True}, ["attention_bias is true, expected false"]),
    ({"tie_word_embeddings": True}, ["tie_word_embeddings is true"]),
    ({"num_key_value_heads": 8}, ["num_key_value_heads is 8, expected 1"]),
    ({"dspark_markov_rank": 256}, ["dspark_target_layer_ids is missing"]),
    ({"dspark_target_layer_ids": [1]}, ["dspark_markov_rank is missing"]),
    ({"dspark_markov_rank": 0, "dspark_target_layer_ids": [1]}, ["dspark_markov_rank is 0"]),
    ({"dspark_markov_rank": 256, "dspark_target_layer_ids": [43]}, ["layer_ids[0] is 43", "from 0 to 42"]),
    ({"dspark_markov_rank": 256, "dspark_target_layer_ids": []}, ["dspark_target_layer_ids is []"]),
    ({"dspark_markov_rank": 256, "dspark_target_layer_ids": [0] * 17}, ["dspark_target_layer_ids is an array of 17"]),
    (
        {"dspark_markov_rank": 256, "dspark_target_layer_ids": [1], "compress_ratios": RATIOS[:43]},
        ["compress_ratios is an array of 43", "dspark_markov_rank"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), WRONG, ids=[",".join(changes) for changes, _ in WRONG])
def test_wrong_configs_are_refused_by_name(changes: dict[str, Any], says: list[str]) -> None:
    message = refusal(changed(**changes))
    for part in says:
        assert part in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v4.1-flash", "V4.1"),
        ("flash-inference", "inference code"),
        ("pro-inference", "inference code"),
        ("v4.1-flash-inference", "inference code"),
    ],
)
def test_other_released_configs_are_recognised_and_refused(name: str, says: str) -> None:
    assert says in text_refusal((DATA / "configs" / f"{name}.json").read_bytes())


@pytest.mark.parametrize("data", [None, [], "config", 7, True], ids=ascii)
def test_what_is_no_object_is_refused(data: object) -> None:
    assert "expected a JSON object" in refusal(data)
    assert "expected a JSON object" in text_refusal(json.dumps(data))


def with_value(literal: str) -> str:
    """Flash's text with the value of hidden_size spelt otherwise."""
    assert FLASH_TEXT.count('"hidden_size": 4096') == 1
    return FLASH_TEXT.replace('"hidden_size": 4096', f'"hidden_size": {literal}')


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        (b"", "not valid JSON"),
        ("{", "not valid JSON"),
        (FLASH_TEXT[:-10], "not valid JSON"),
        (FLASH_TEXT + "}", "not valid JSON"),
        (b"\xff\xfe" + FLASH_TEXT.encode("utf-16-le"), "not valid JSON"),
        (FLASH_TEXT.encode().replace(b"silu", b"sil\xff"), "not valid JSON"),
        (b"\x80\x04\x95", "not valid JSON"),  # a pickle
        (with_value("NaN"), "'NaN' is not a finite number"),
        (with_value("-Infinity"), "'-Infinity' is not a finite number"),
        (with_value("1e999"), "'1e999' is not a finite number"),
        (with_value("9" * 5000), "an integer of 5000 digits"),
        (with_value('4096, "hidden_size": 4096'), "'hidden_size' appears twice"),
        (with_value('4096, "x": {"\\u001b": 1, "\\u001b": 2}'), r"'\x1b' appears twice"),
        (with_value("[" * 100_000), "nested too deeply"),
        (with_value('{"a":' * 100_000), "nested too deeply"),
        (with_value("[" * 100_000 + "]" * 100_000), "nested too deeply"),
        (" " * MAX_CONFIG_BYTES + FLASH_TEXT, "bytes, expected a config.json of at most"),
    ],
    ids=range(18),
)
def test_hostile_text_is_refused(text: str | bytes, says: str) -> None:
    assert says in text_refusal(text)


def test_parse_keeps_every_key_in_order() -> None:
    assert list(parse_config_json(FLASH_TEXT, "config.json").items()) == list(json.loads(FLASH_TEXT).items())


def test_the_largest_inventory_stays_small() -> None:
    """As many experts as are accepted still list in moderate memory and time; one block more is refused."""
    wide: dict[str, Any] = {"num_hidden_layers": 1, "num_hash_layers": 1, "n_routed_experts": 65_536}
    config = V4Config.from_json(changed(**wide, compress_ratios=[0]), "config.json")
    assert len(logical_tensors(config)) < 200_000
    assert "n_routed_experts is 65536, expected at most 32,768" in refusal(changed(**wide, compress_ratios=[0, 0]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*json.loads(FLASH_TEXT), "dspark_markov_rank"]), json_values, max_size=3))
def test_any_values_load_or_are_refused(changes: dict[str, Any]) -> None:
    try:
        config = V4Config.from_json(changed(**changes), "config.json")
    except UsageError as error:
        checked(error)
    else:
        assert config.mtp_blocks >= 0
