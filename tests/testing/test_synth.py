"""Synthetic checkpoints: the released files' sizes to the byte, deterministic bytes, nothing half-written left."""

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from v4quant.checkpoint import output
from v4quant.checkpoint.layout import lay_out
from v4quant.errors import OutputError
from v4quant.testing.asserts import assert_same_checkpoint
from v4quant.testing.releases import Like, synth_config
from v4quant.testing.synth import SynthPlan, plan_synth, write_checkpoint

SHARDS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data/configs/shards.json").read_text())
RELEASES = {
    Like.FLASH: "DeepSeek-V4-Flash",
    Like.PRO: "DeepSeek-V4-Pro",
    Like.FLASH_BASE: "DeepSeek-V4-Flash-Base",
    Like.PRO_BASE: "DeepSeek-V4-Pro-Base",
    Like.FLASH_0731: "DeepSeek-V4-Flash-0731",
    Like.PRO_0813: "DeepSeek-V4-Pro-0813",
}
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I64": torch.int64,
}


def tiny_plan(like: str) -> SynthPlan:
    return plan_synth(*synth_config(like, tiny=True))


def write_small(out: Path, like: str = "flash", seed: int = 0, workers: int = 2, overwrite: bool = False) -> None:
    """Write the smallest checkpoint: one layer, two experts, no MTP."""
    config_json, scheme = synth_config(like, tiny=True, layers=1, experts=2, mtp=False)
    write_checkpoint(out, config_json, scheme, seed, workers=workers, overwrite=overwrite)


def without_optional_tensors(plan: SynthPlan) -> list[int]:
    """File size, header size and tensors of the last shard, less the tensors that shards.json does not count."""
    tensors = [plan.tensors[name] for name in plan.shards[-1].entries]
    kept = [(t.name, t.dtype, t.storage_shape) for t in tensors if not t.optional]
    (shard,) = lay_out(((tensor,) for tensor in kept), 2**62)
    return [shard.file_bytes, len(shard.header), len(shard.entries)]


@pytest.mark.parametrize("like", list(Like))
def test_every_file_has_the_released_size(like: Like) -> None:
    release = SHARDS[RELEASES[like]]
    plan = plan_synth(*synth_config(like))
    found = {shard.name: [shard.file_bytes, len(shard.header), len(shard.entries)] for shard in plan.shards}
    if like.is_base:
        found[plan.shards[-1].name] = without_optional_tensors(plan)
    assert found == release["files"]
    assert plan.report.tensors == release["tensors"]
    assert plan.report.bytes == release["total_size"]
    assert plan.report.files == {shard.name: shard.file_bytes for shard in plan.shards}
    if like is Like.PRO_0813:
        assert len(plan.side_files["model.safetensors.index.json"]) == 11_651_606  # published, facts 3.3


def test_a_cut_checkpoint_keeps_real_layers() -> None:
    files = plan_synth(*synth_config("flash", layers=1)).report.files
    assert list(files.values()) == [1_059_061_856, 3_566_321_192, 1_059_332_516, 3_593_956_092]


@pytest.mark.parametrize("like", list(Like))
def test_tiny_opens_in_safetensors_with_the_true_dtypes(like: Like, tmp_path: Path) -> None:
    plan = tiny_plan(like)
    config_json, scheme = synth_config(like, tiny=True)
    report = write_checkpoint(tmp_path, config_json, scheme)
    assert report == plan.report
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == plan.disk_bytes < 20_000_000
    seen = set()
    for shard in plan.shards:
        assert (tmp_path / shard.name).stat().st_size == shard.file_bytes
        with safetensors.safe_open(tmp_path / shard.name, "pt") as file:
            assert file.metadata() is None
        for name, tensor in load_file(tmp_path / shard.name).items():
            expected = plan.tensors[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (TORCH_DTYPES[expected.dtype], expected.storage_shape)
            if tensor.dtype != torch.int64:
                assert torch.isfinite(tensor.float()).all(), name
            seen.add(name)
    assert seen == set(plan.tensors)


def test_files_beside_the_weights(tmp_path: Path) -> None:
    config_json, scheme = synth_config("flash", tiny=True)
    report = write_checkpoint(tmp_path, config_json, scheme)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == config_json
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": report.bytes}
    assert len(index["weight_map"]) == report.tensors
    assert set(index["weight_map"].values()) == set(report.files)
    # The releases' generation_config.json has 170 bytes (facts 3.4).
    assert (tmp_path / "generation_config.json").stat().st_size == 170
    assert json.loads((tmp_path / "inference/config.json").read_text())["dim"] == config["hidden_size"]
    assert "synthetic" in (tmp_path / "README.md").read_text()


def test_base_has_weights_and_config_alone(tmp_path: Path) -> None:
    write_small(tmp_path, "flash-base")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json"] + [".safetensors"] * 3


def test_header_style_is_the_releases(tmp_path: Path) -> None:
    write_small(tmp_path)
    data = (tmp_path / "model-00002-of-00003.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length]
    assert length % 8 == 0
    assert b'":{"dtype":"' in text
    assert not text.startswith(b'{"__metadata__"')
    entries = json.loads(text)
    dtypes = [entry["dtype"] for entry in entries.values()]
    assert dtypes == sorted(dtypes, key=["I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8"].index)


def test_bytes_depend_on_the_seed_and_nothing_else(tmp_path: Path) -> None:
    write_small(tmp_path / "a", workers=1)
    write_small(tmp_path / "b", workers=2)
    write_small(tmp_path / "c", seed=1)
    assert_same_checkpoint(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError, match="files differ"):
        assert_same_checkpoint(tmp_path / "a", tmp_path / "c")


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    counts: dict[str, int] = {}

    def advance(count: int, shard: str) -> None:
        counts[shard] = counts.get(shard, 0) + count

    config_json, scheme = synth_config("flash", tiny=True, layers=1, experts=2)
    report = write_checkpoint(tmp_path, config_json, scheme, workers=1, progress=advance)
    assert counts.keys() == report.files.keys()
    assert sum(counts.values()) == report.bytes


def test_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty") as refusal:
        write_small(tmp_path)
    assert "--overwrite" in refusal.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_refuses_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file, expected a folder"):
        write_small(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_overwrite_leaves_nothing_of_the_old_checkpoint_but_foreign_files(tmp_path: Path) -> None:
    config_json, scheme = synth_config("flash", tiny=True, layers=2)
    write_checkpoint(tmp_path / "a", config_json, scheme)
    (tmp_path / "a" / "model-00009-of-00009.safetensors.partial").write_bytes(b"")
    (tmp_path / "a" / "v4quant.certificate.jsonl").write_bytes(b"")
    (tmp_path / "a" / "tokenizer.json").write_text("mine")
    write_small(tmp_path / "a", overwrite=True)
    (tmp_path / "a" / "tokenizer.json").unlink()
    write_small(tmp_path / "b")
    assert_same_checkpoint(tmp_path / "a", tmp_path / "b")


def test_too_small_a_disk_is_refused_before_anything_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_small(out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr(output, "free_bytes", lambda _folder: 5000)
    write_small(out, overwrite=True)  # what it replaces makes room enough
    config_json, scheme = synth_config("flash", tiny=True)
    with pytest.raises(OutputError, match="5,000 are free"):
        write_checkpoint(out, config_json, scheme, overwrite=True)
    assert before.keys() == {path.name for path in out.iterdir()}
    with pytest.raises(OutputError, match="5,000 are free"):
        write_small(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("writes_before", [0, 1, 20, 40])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes_before: int) -> None:
    pwrite, calls = os.pwrite, iter(range(10_000))

    def fill_up(descriptor: int, data: memoryview, offset: int) -> int:
        if next(calls) >= writes_before:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fill_up)
    with pytest.raises(OutputError, match="No space left on device"):
        write_small(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert next(calls) > writes_before


def test_a_failure_in_the_last_files_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def refuse(source: Path, target: Path) -> Path:
        if target.name == "config.json" and target.parent.name == "out":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="Disk quota exceeded"):
        write_small(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_count: int, shard: str) -> None:
        if shard.startswith("model-00002"):
            raise KeyboardInterrupt

    config_json, scheme = synth_config("flash", tiny=True)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", config_json, scheme, progress=interrupt)
    assert list((tmp_path / "out").iterdir()) == []
