"""verify --against compares configs: another model under the same weights is a mismatch, another storage is none."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.conversion import convert, write_small
from v4quant.checkpoint.compare_config import config_differences
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.checkpoint.verify import verify_values
from v4quant.cli.main import main
from v4quant.config import CONFIG_NAME, V4Config

# Path of a key in config.json, another value for it, what the mismatch must say. The source has the releases' values.
CHANGED: list[tuple[str, Any, str]] = [
    ("swiglu_limit", 1000.0, "swiglu_limit is 1000.0, expected 10.0"),
    ("routed_scaling_factor", 1, "routed_scaling_factor is 1.0, expected 1.5"),
    ("rope_theta", 10001, "rope_theta is 10001.0, expected 10000.0"),
    ("compress_rope_theta", 10000, "compress_rope_theta is 10000.0, expected 160000.0"),
    ("rms_norm_eps", 1e-05, "rms_norm_eps is 1e-05, expected 1e-06"),
    ("hc_eps", 1e-05, "hc_eps is 1e-05, expected 1e-06"),
    ("rope_scaling.factor", 1, "rope_scaling.factor is 1.0, expected 16.0"),
    ("rope_scaling.beta_fast", 16, "rope_scaling.beta_fast is 16.0, expected 32.0"),
    ("rope_scaling.beta_slow", 2, "rope_scaling.beta_slow is 2.0, expected 1.0"),
    (
        "rope_scaling.original_max_position_embeddings",
        4096,
        "rope_scaling.original_max_position_embeddings is 4096, expected 65536",
    ),
    ("index_topk", 15, "index_topk is 15, expected 16"),
    ("sliding_window", 31, "sliding_window is 31, expected 32"),
    ("hc_sinkhorn_iters", 1, "hc_sinkhorn_iters is 1, expected 20"),
    ("num_experts_per_tok", 1, "num_experts_per_tok is 1, expected 2"),
    ("num_nextn_predict_layers", 0, "num_nextn_predict_layers is 0, expected 1"),
    ("max_position_embeddings", 4096, "max_position_embeddings is 4096, expected 1048576"),
    ("compress_ratios", [128, 0], "compress_ratios[0] is 128, expected 0"),
    ("compress_ratios", [0], "compress_ratios has 1 elements, expected 2"),
    ("eos_token_id", 2, "eos_token_id is 2, expected 1"),
    ("bos_token_id", None, "bos_token_id is null, expected 0"),
    ("quantization_config.scale_fmt", None, "quantization_config.scale_fmt is null, expected 'ue8m0'"),
]
# Another storage, or words that no model depends on.
SAME_MODEL: list[tuple[str, Any]] = [
    ("swiglu_limit", 10),
    ("rope_theta", 10000.0),
    ("expert_dtype", None),
    ("transformers_version", "5.0.0"),
    ("quantization_config.activation_scheme", None),
]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("config") / "native", mtp=True)


def with_key(folder: Path, copy: Path, path: str, value: Any) -> Path:
    """A copy whose config.json says something else; None removes the key."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / CONFIG_NAME).read_text())
    *outer, key = path.split(".")
    inside = config[outer[0]] if outer else config
    if value is None:
        del inside[key]
    else:
        inside[key] = value
    (copy / CONFIG_NAME).write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(("path", "value", "reason"), CHANGED, ids=[f"{row[0]}={row[1]}" for row in CHANGED])
def test_another_model_is_a_mismatch(path: str, value: Any, reason: str, native: Path, tmp_path: Path) -> None:
    out = open_checkpoint(with_key(native, tmp_path / "out", path, value))
    report = verify_values(out, open_checkpoint(native))
    assert reason in [mismatch.reason for mismatch in report.mismatches if mismatch.tensor == CONFIG_NAME]


@pytest.mark.parametrize(("path", "value"), SAME_MODEL, ids=[f"{row[0]}={row[1]}" for row in SAME_MODEL])
def test_the_same_model_in_other_words_is_none(path: str, value: Any, native: Path, tmp_path: Path) -> None:
    out = open_checkpoint(with_key(native, tmp_path / "out", path, value))
    assert verify_values(out, open_checkpoint(native)).ok


def test_every_field_of_the_config_counts_but_those_of_storage(native: Path) -> None:
    """A field that is added to V4Config is compared, or somebody decides that it is about storage."""
    source = open_checkpoint(native)
    ignored = set()
    for field in dataclasses.fields(V4Config):
        value = getattr(source.config, field.name)
        other: Any = (*value, 7) if isinstance(value, tuple) else "another"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            other = dataclasses.replace(value, **{dataclasses.fields(value)[0].name: "another"})
        changed: dict[str, Any] = {field.name: other}
        out = dataclasses.replace(source, config=dataclasses.replace(source.config, **changed))
        if not list(config_differences(out, source)):
            ignored.add(field.name)
    assert ignored == {"expert_dtype", "quantization_config"}


@pytest.mark.parametrize("target", ["fp8", "bf16", "base"])
def test_conversions_keep_the_model(target: str, native: Path, tmp_path: Path) -> None:
    convert(native, tmp_path / "out", target)
    converted, source = open_checkpoint(tmp_path / "out"), open_checkpoint(native)
    assert not list(config_differences(converted, source))
    assert not list(config_differences(source, converted))


def test_base_scales_may_lack_the_label(native: Path, tmp_path: Path) -> None:
    """F32 scales need no ue8m0, whatever the Base releases say."""
    convert(native, tmp_path / "base", "base")
    out = with_key(tmp_path / "base", tmp_path / "out", "quantization_config.scale_fmt", None)
    assert not list(config_differences(open_checkpoint(out), open_checkpoint(native)))


def test_the_command_fails_and_names_the_key(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = with_key(native, tmp_path / "out", "swiglu_limit", 1000.0)
    assert main(["verify", str(out), "--against", str(native), "--json"]) == 1
    [mismatch] = json.loads(capsys.readouterr().out)["mismatches"]
    assert mismatch == {"tensor": CONFIG_NAME, "reason": "swiglu_limit is 1000.0, expected 10.0"}
