"""What every format says of itself: names, the keys of both config files, and when its casts may round."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from v4quant.config import V4Config
from v4quant.encodings import BF16_SCHEME, NATIVE_SCHEME, SCHEMES
from v4quant.errors import UsageError
from v4quant.formats import FORMATS, Format, format_named
from v4quant.formats.risk import rounding_risk

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
RELEASED = ["flash", "pro", "flash-0731", "pro-0813"]
every_format = pytest.mark.parametrize("target", FORMATS.values(), ids=FORMATS)


def released(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


def test_the_registry_has_every_scheme_under_its_name() -> None:
    assert {name: known.scheme for name, known in FORMATS.items()} == SCHEMES
    for name, known in FORMATS.items():
        assert known.name == name
        assert format_named(name) is known
        assert known.summary


@pytest.mark.parametrize("name", ["nvfp4", "", "FP8", "native "])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        format_named(name)
    assert repr(name) in str(caught.value)
    for known in FORMATS.values():
        assert f"{known.name} ({known.summary})" in caught.value.hint


EXPECTED_KEYS = {  # expert_dtype, whether there is a quantization_config
    "native": ("fp4", True),
    "fp8": ("fp8", True),
    "base": ("fp8", True),
    "bf16": (None, False),
}


@every_format
@pytest.mark.parametrize("name", RELEASED)
def test_config_json_says_what_is_stored(target: Format, name: str) -> None:
    source = released(name)
    before = copy.deepcopy(source)
    config = target.config_json(source)
    assert source == before  # the caller's object is left alone
    expert_dtype, quantised = EXPECTED_KEYS[target.name]
    assert config.get("expert_dtype") == expert_dtype
    assert ("expert_dtype" in config) == (expert_dtype is not None)
    assert ("quantization_config" in config) == quantised
    if quantised:
        assert config["quantization_config"] == source["quantization_config"]
    changed = {"expert_dtype", "quantization_config"}
    assert {k: v for k, v in config.items() if k not in changed} == {
        k: v for k, v in source.items() if k not in changed
    }
    declared = {"native": NATIVE_SCHEME, "bf16": BF16_SCHEME}.get(target.name)  # FP8 of which kind, only headers tell
    assert V4Config.from_json(config, "config.json").declared_scheme == declared


@every_format
def test_the_order_of_keys_stays(target: Format) -> None:
    source = released("flash")
    config = target.config_json(source)
    assert list(config) == [key for key in source if key in config]
    inference = released("flash-inference")
    flat = target.inference_config(inference)
    assert list(flat) == [key for key in inference if key in flat]


@pytest.mark.parametrize(("there", "back"), list(itertools.permutations(FORMATS.values(), 2)), ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["flash", "pro-0813"])
def test_a_config_comes_back_from_every_other_format(there: Format, back: Format, name: str) -> None:
    """Also from bf16, which has no quantization_config to go by."""
    original = back.config_json(released(name))
    assert back.config_json(there.config_json(original)) == original
    flat = back.inference_config(released("flash-inference"))
    assert back.inference_config(there.inference_config(flat)) == flat


def test_native_is_what_the_releases_say() -> None:
    for name in RELEASED:
        assert list(FORMATS["native"].config_json(released(name)).items()) == list(released(name).items())
    for name in ("flash-inference", "pro-inference"):
        assert list(FORMATS["native"].inference_config(released(name)).items()) == list(released(name).items())


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("native", {"dtype": "fp8", "scale_fmt": "ue8m0", "expert_dtype": "fp4"}),
        ("fp8", {"dtype": "fp8", "scale_fmt": "ue8m0"}),
        ("base", {"dtype": "fp8", "scale_fmt": "ue8m0"}),
        ("bf16", {"dtype": "bf16", "scale_fmt": "ue8m0"}),  # which is of activations, too
    ],
)
def test_inference_config_says_what_is_stored(target: str, expected: dict[str, str]) -> None:
    """DeepSeek's inference code takes experts for FP8 where there is no expert_dtype."""
    source = released("flash-inference")
    flat = FORMATS[target].inference_config(source)
    assert source == released("flash-inference")
    found = {key: flat[key] for key in ("dtype", "scale_fmt", "expert_dtype") if key in flat}
    assert found == expected
    assert all(flat[key] == value for key, value in source.items() if key not in ("dtype", "scale_fmt", "expert_dtype"))


def test_a_block_size_or_other_keys_of_the_source_are_kept() -> None:
    config = released("flash")
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head"]
    for name in ("native", "fp8", "base"):
        assert FORMATS[name].config_json(config)["quantization_config"] == config["quantization_config"]


def test_expert_dtype_that_transformers_moved_is_taken_out() -> None:
    config = released("flash")
    config["quantization_config"]["expert_dtype"] = config.pop("expert_dtype")
    for target in FORMATS.values():
        rewritten = target.config_json(config)
        assert rewritten.get("expert_dtype") == EXPECTED_KEYS[target.name][0]
        assert "expert_dtype" not in rewritten.get("quantization_config", {})


def test_a_config_that_the_targets_share_is_not_shared_in_memory() -> None:
    bf16 = FORMATS["bf16"].config_json(released("flash"))
    first = FORMATS["fp8"].config_json(bf16)
    first["quantization_config"]["fmt"] = "changed"
    assert FORMATS["fp8"].config_json(bf16)["quantization_config"]["fmt"] == "e4m3"


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("native", "fp8", "2^14"),
        ("native", "base", "2^14"),
        ("native", "bf16", ""),
        ("fp8", "native", "FP4 grid"),
        ("fp8", "bf16", ""),
        ("fp8", "base", ""),
        ("base", "fp8", "no power of two"),
        ("base", "bf16", "no power of two"),
        ("bf16", "native", "FP4 grid"),
        ("bf16", "fp8", "FP8 grid"),
        ("bf16", "base", "FP8 grid"),
    ],
)
def test_risk_of_routed_experts(source: str, target: str, says: str) -> None:
    risk = rounding_risk(SCHEMES[source].expert, SCHEMES[target].expert)
    assert says in risk
    assert bool(says) == bool(risk)


@every_format
def test_copies_have_no_risk(target: Format) -> None:
    assert rounding_risk(target.scheme.expert, target.scheme.expert) == ""
    assert rounding_risk(target.scheme.dense, target.scheme.dense) == ""
