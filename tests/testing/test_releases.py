"""Configs of synthetic checkpoints: equal to the released ones at full size, consistent when cut down."""

import json
from pathlib import Path
from typing import Any

import pytest

from v4quant.config import V4Config
from v4quant.encodings import BASE_SCHEME, NATIVE_SCHEME
from v4quant.errors import UsageError
from v4quant.testing.releases import Like, Vocab, inference_config, synth_config

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def released(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize("like", ["flash", "pro", "flash-0731", "pro-0813"])
def test_full_size_is_the_released_config(like: str) -> None:
    assert synth_config(like) == (released(like), NATIVE_SCHEME)


@pytest.mark.parametrize("like", ["flash", "pro"])
def test_base_differs_in_expert_dtype_alone(like: str) -> None:
    assert synth_config(f"{like}-base") == (released(like) | {"expert_dtype": "fp8"}, BASE_SCHEME)


@pytest.mark.parametrize("like", ["flash", "pro"])
def test_inference_config_is_the_released_one(like: str) -> None:
    flat = inference_config(released(like))
    assert list(flat.items()) == list(released(f"{like}-inference").items())


def test_inference_config_of_dspark_has_the_published_size() -> None:
    flat = inference_config(released("pro-0813"))
    lines = ",\n".join(f'    "{key}": {json.dumps(value)}' for key, value in flat.items())
    assert len(f"{{\n{lines}\n}}") == 1240  # facts: inference/config.json of Pro-0813


@pytest.mark.parametrize("like", list(Like))
@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("layers", [None, 1, 2, 5])
def test_every_cut_is_a_valid_config(like: Like, tiny: bool, layers: int | None) -> None:
    config_json, _ = synth_config(like, tiny=tiny, layers=layers, experts=2)
    config = V4Config.from_json(config_json, "synth")
    full = V4Config.from_json(synth_config(like)[0], "release")
    assert config.mtp_blocks == full.mtp_blocks
    assert config.is_dspark == full.is_dspark
    assert config.compress_ratios[: layers or 5] == full.compress_ratios[: layers or 5]
    assert (config.n_routed_experts, config.num_experts_per_tok) == (2, 2)
    if layers is not None:
        assert config.num_hidden_layers == layers
        assert config.num_hash_layers == min(3, layers)


@pytest.mark.parametrize("like", list(Like))
def test_tiny_keeps_every_feature(like: Like) -> None:
    config = V4Config.from_json(synth_config(like, tiny=True)[0], "synth")
    full = V4Config.from_json(synth_config(like)[0], "release")
    assert set(config.compress_ratios) == set(full.compress_ratios) == {0, 4, 128}
    assert 0 < config.num_hash_layers < config.num_hidden_layers
    assert config.mtp_blocks == full.mtp_blocks
    assert len(config.dspark_target_layer_ids) == len(full.dspark_target_layer_ids)
    assert config.num_experts_per_tok < config.n_routed_experts
    for rows_or_columns in (config.hidden_size, config.moe_intermediate_size):
        assert rows_or_columns >= 256
        assert rows_or_columns % 128 == 0


@pytest.mark.parametrize("like", list(Like))
def test_vocabularies(like: Like) -> None:
    full = synth_config(like)[0]
    small, chat = (synth_config(like, tiny=True, vocab=vocab)[0] for vocab in (Vocab.SMALL, Vocab.FULL))
    assert small == synth_config(like, tiny=True)[0]
    assert chat["vocab_size"] == full["vocab_size"] == 129_280
    changed = {key for key in chat if chat[key] != small[key]}
    assert changed == {"vocab_size"} | ({"dspark_noise_token_id"} & chat.keys())
    assert chat.get("dspark_noise_token_id") == full.get("dspark_noise_token_id")
    wide = synth_config(like, vocab=Vocab.SMALL)[0]
    assert (wide["vocab_size"], wide["hidden_size"]) == (512, full["hidden_size"])
    assert wide.get("dspark_noise_token_id", 511) == 511


@pytest.mark.parametrize(("layers", "targets"), [(61, (58, 59, 60)), (4, (1, 2, 3)), (2, (0, 0, 1)), (1, (0, 0, 0))])
def test_dspark_targets_are_the_last_layers(layers: int, targets: tuple[int, ...]) -> None:
    config_json, _ = synth_config("pro-0813", layers=layers)
    assert tuple(config_json["dspark_target_layer_ids"]) == targets


@pytest.mark.parametrize("like", ["flash", "pro-0813"])
def test_without_mtp(like: str) -> None:
    config = V4Config.from_json(synth_config(like, mtp=False)[0], "synth")
    assert config.mtp_blocks == config.num_nextn_predict_layers == 0
    assert not config.is_dspark


def test_experts_keep_the_released_top_k_where_they_can() -> None:
    assert synth_config("flash", experts=32)[0]["num_experts_per_tok"] == 6
    assert synth_config("flash", experts=4)[0]["num_experts_per_tok"] == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"like": "flush"}, "like is 'flush', expected one of flash, pro"),
        ({"like": "flash", "layers": 0}, "layers is 0, expected 1 to 43"),
        ({"like": "pro", "layers": 62}, "layers is 62, expected 1 to 61"),
        ({"like": "flash", "layers": 6, "tiny": True}, "layers is 6, expected 1 to 5"),
        ({"like": "flash", "experts": -1}, "experts is -1, expected 1 to 256"),
        ({"like": "pro", "experts": 385}, "experts is 385, expected 1 to 384"),
    ],
)
def test_refuses_what_the_release_does_not_have(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        synth_config(**arguments)
