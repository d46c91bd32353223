"""Opening a folder: all releases at full size from headers alone, and what a whole folder can get wrong.

The full-size releases are sparse files: true headers at the front of files of the released size, with nothing behind.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.conversion import REFERENCES
from tests.checkpoint.sparse import write_sparse
from v4quant.checkpoint.header import build_header
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.reader import JOURNAL_NAME, Checkpoint, open_checkpoint
from v4quant.config import CONFIG_NAME
from v4quant.errors import CheckpointError, UsageError
from v4quant.testing.releases import Like, synth_config
from v4quant.testing.synth import plan_synth

DATA = Path(__file__).parents[1] / "data"
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The smallest checkpoint: one layer, two experts, no MTP block, three shards."""
    return write_sparse(tmp_path / "checkpoint", "flash", tiny=True, layers=1, experts=2, mtp=False)


def edit_config(folder: Path, **keys: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def problems(folder: Path) -> list[str]:
    return [str(problem) for problem in open_checkpoint(folder).problems]


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


# Sound checkpoints.


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.name)
def test_reference_checkpoints_are_sound(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.problems == []
    assert checkpoint.scheme.name == ("base" if path.name == "tiny-base" else "native")
    checkpoint.require_sound()


@pytest.mark.parametrize("like", list(Like))
def test_tiny_releases_are_sound(like: Like, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_sparse(tmp_path, like, tiny=True))
    assert checkpoint.problems == []
    assert checkpoint.model is checkpoint.config
    assert len(checkpoint.logical) == len([name for name in checkpoint.tensors if not name.endswith(".scale")])
    shard_order = [int(checkpoint.tensors[tensor.name].file[6:11]) for tensor in checkpoint.logical]
    assert shard_order == sorted(shard_order)


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    config_json, scheme = synth_config("flash", tiny=True, layers=1, experts=2, mtp=False)
    tensors = [(t.name, t.dtype, t.storage_shape) for t in plan_synth(config_json, scheme).tensors.values()]
    header, entries = build_header(tensors, file="model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(header)
    os.truncate(tmp_path / "model.safetensors", entries[-1].stop)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config_json))
    assert problems(tmp_path) == []


def test_identity_follows_headers_config_and_sizes(folder: Path) -> None:
    first = open_checkpoint(folder)
    same = open_checkpoint(folder).source_id()
    assert first.source_id() == same
    assert first.fingerprints().keys() == {CONFIG_NAME, *first.header_sha256}
    edit_config(folder, note="another file, the same model")
    assert open_checkpoint(folder).source_id() != same


# The config of another model.


def test_a_flash_config_on_pro_weights_tells_the_release_of_the_bytes(tmp_path: Path) -> None:
    """Not 145,116 wrong tensors: the dimensions that the config gets wrong, and the release that is stored."""
    write_sparse(tmp_path, "pro")
    (tmp_path / CONFIG_NAME).write_bytes((DATA / "configs" / "flash.json").read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.release == "DeepSeek-V4-Pro"
    assert len(checkpoint.tensors) == 145_116
    assert sorted(str(problem).split(" is stored (")[0] for problem in checkpoint.problems) == [
        "config.json: says hidden_size 4,096, but 7,168",
        "config.json: says moe_intermediate_size 2,048, but 3,072",
        "config.json: says n_routed_experts 256, but 384",
        "config.json: says num_attention_heads 64, but 128",
        "config.json: says num_hidden_layers 43, but 61",
        "config.json: says o_groups 8, but 16",
        "config.json: says q_lora_rank 1,024, but 1,536",
    ]


@pytest.mark.parametrize(
    ("config", "bytes_of", "release"),
    [
        ("pro", "flash", "DeepSeek-V4-Flash"),
        ("flash-0731", "flash-base", "DeepSeek-V4-Flash-Base"),
        ("flash", "flash-0731", "DeepSeek-V4-Flash (DSpark, 0731)"),
    ],
)
def test_the_release_is_that_of_the_bytes(config: str, bytes_of: str, release: str, tmp_path: Path) -> None:
    write_sparse(tmp_path, bytes_of)
    (tmp_path / CONFIG_NAME).write_bytes((DATA / "configs" / f"{config}.json").read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.release == release
    assert {problem.where for problem in checkpoint.problems} == {CONFIG_NAME}


def test_a_base_config_on_native_weights(tmp_path: Path) -> None:
    write_sparse(tmp_path, "flash", tiny=True)
    edit_config(tmp_path, expert_dtype="fp8")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.scheme.name == "native"
    assert list(map(str, checkpoint.problems)) == [
        "config.json: says expert_dtype fp8, but the tensors are stored as fp4 experts and fp8 elsewhere (native)"
    ]


def test_a_checkpoint_that_lacks_its_last_shards(tmp_path: Path) -> None:
    """As a download that was broken off: the files are named, not each of their tensors."""
    write_sparse(tmp_path, "flash", tiny=True)
    for number in (6, 7, 8):
        (tmp_path / f"model-0000{number}-of-00008.safetensors").unlink()
    found = problems(tmp_path)
    absent = [problem for problem in found if "which is missing or could not be read" in problem]
    assert len(absent) == 3
    assert "config.json: says num_hidden_layers 5, but 4 is stored" in "\n".join(found)


# Single faults, in a checkpoint that is sound otherwise.


def add_shard(folder: Path, name: str, *tensors: tuple[str, str, tuple[int, ...]]) -> None:
    header, entries = build_header(tensors, file=name)
    (folder / name).write_bytes(header + bytes(sum(entry.bytes for entry in entries)))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    edit(index)
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_a_tensor_stored_twice(folder: Path) -> None:
    add_shard(folder, "more.safetensors", ("norm.weight", "BF16", (256,)))
    assert problems(folder) == [
        "norm.weight: is stored twice, in model-00003-of-00003.safetensors and in more.safetensors"
    ]


def test_a_missing_index(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    assert problems(folder) == [f"{INDEX_NAME}: is missing, expected beside 3 weight files; loaders need it"]


def test_a_damaged_index(folder: Path) -> None:
    (folder / INDEX_NAME).write_text("{")
    (problem,) = problems(folder)
    assert problem.startswith(f"{INDEX_NAME}: not valid JSON: ")


def test_the_index_is_compared_both_ways(folder: Path) -> None:
    edit_index(folder, lambda index: index["weight_map"].pop("norm.weight"))
    edit_index(folder, lambda index: index["weight_map"].update({"layers.0.extra": SECOND, "embed.weight": "../x"}))
    edit_index(folder, lambda index: index["metadata"].update(total_size=1))
    assert problems(folder) == [
        f"{INDEX_NAME}: puts 1 tensors into '../x', which is no file name; nothing outside the folder is read",
        f"layers.0.extra: is listed by the index in {SECOND}, which does not hold it",
        "norm.weight: is stored in model-00003-of-00003.safetensors, but the index does not list it",
        f"{INDEX_NAME}: metadata.total_size is 1, but the tensors have 1,416,472 bytes",
    ]


def test_a_damaged_shard_is_named_first(tmp_path: Path) -> None:
    write_sparse(tmp_path, "flash", tiny=True)
    name = "model-00003-of-00008.safetensors"
    os.truncate(tmp_path / name, 100)
    found = problems(tmp_path)
    assert found[0].startswith(f"{name}: claims a header of ")
    assert found[-2:] == [
        f"{INDEX_NAME}: puts 77 tensors into '{name}', which is missing or could not be read",
        found[-1],
    ]
    assert "metadata.total_size is" in found[-1]


def test_a_damaged_shard_is_told_even_where_no_matrix_is_left(folder: Path) -> None:
    os.truncate(folder / SECOND, 100)
    assert refusal(folder).startswith(f"{folder}: no header of weight matrices could be read:\n  {SECOND}: claims a")


def test_no_header_can_be_read(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    message = refusal(folder)
    assert message.startswith(f"{folder}: no header of weight matrices could be read:\n  model-00001-of-00003.safete")
    assert message.count("\n") == 3


def test_require_sound_lists_the_first_of_each_kind(folder: Path) -> None:
    def drop(index: dict[str, Any]) -> None:
        for name in list(index["weight_map"]):
            if ".experts." in name or name == "norm.weight":
                del index["weight_map"][name]

    edit_index(folder, drop)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder).require_sound()
    lines = str(caught.value).split("\n")
    assert lines[0] == f"{folder}: 13 problems:"
    expert = f"is stored in {SECOND}, but the index does not list it"
    assert f"  layers.0.ffn.experts.0.w1.weight: {expert} (and 5 alike)" in lines
    assert f"  layers.0.ffn.experts.0.w1.scale: {expert} (and 5 alike)" in lines
    assert "  norm.weight: is stored in model-00003-of-00003.safetensors, but the index does not list it" in lines
    assert len(lines) == 4
    assert caught.value.hint == f"See all of them with: v4quant inspect {folder} --json"


# Files that are no part of the checkpoint.


def reference_outputs(folder: Path, name: str = "reference_outputs.safetensors") -> None:
    save_file({"logits": torch.zeros(4, 8), "layers.0.hidden": torch.zeros(2)}, folder / name)


def test_a_foreign_safetensors_file_is_left_out(folder: Path) -> None:
    before = open_checkpoint(folder)
    reference_outputs(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.problems == []
    assert checkpoint.foreign_files == ["reference_outputs.safetensors"]
    assert checkpoint.tensors == before.tensors
    assert checkpoint.source_id() == before.source_id()
    assert before.foreign_files == []


def test_a_foreign_file_that_the_index_names_is_a_part(folder: Path) -> None:
    reference_outputs(folder)
    edit_index(folder, lambda index: index["weight_map"].update({"logits": "reference_outputs.safetensors"}))
    found = problems(folder)
    assert "logits: is unexpected (F32 [4, 8] in reference_outputs.safetensors)" in found
    assert open_checkpoint(folder).foreign_files == []


def test_a_file_with_one_v4_tensor_is_a_part(folder: Path) -> None:
    add_shard(folder, "more.safetensors", ("logits", "F32", (4,)), ("layers.1.attn_norm.weight", "BF16", (256,)))
    assert any("layers.1.attn_norm.weight: is stored in more.safetensors, but the index" in p for p in problems(folder))
    assert open_checkpoint(folder).foreign_files == []


def test_files_in_folders_are_not_weights(folder: Path) -> None:
    """As `original/` or `consolidated/` in some repositories, with the same tensors once more."""
    (folder / "original").mkdir()
    add_shard(folder / "original", "model.safetensors", ("norm.weight", "BF16", (256,)))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.problems == []
    assert "original/model.safetensors" not in checkpoint.header_sha256


# Folders that hold no checkpoint.


def test_folders_without_weights(tmp_path: Path) -> None:
    assert "holds no *.safetensors file" in refusal(tmp_path)
    (tmp_path / CONFIG_NAME).write_text("{}")
    assert "holds no *.safetensors file" in refusal(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x02.")
    assert "holds pickle files (pytorch_model-00001-of-00002.bin), which can run code and are never" in refusal(
        tmp_path
    )
    (tmp_path / JOURNAL_NAME).write_text("")
    assert "is an unfinished conversion" in refusal(tmp_path)
    (tmp_path / "model3-mp8.safetensors").write_bytes(b"")
    assert "holds tensor-parallel shards (model3-mp8.safetensors)" in refusal(tmp_path)


def test_an_unfinished_conversion_is_told_as_such(folder: Path) -> None:
    (folder / JOURNAL_NAME).write_text("{}")
    assert problems(folder) == []  # whole but for the journal: a run killed at its very end
    (folder / CONFIG_NAME).unlink()
    assert refusal(folder) == f"{folder}: is an unfinished conversion, expected a whole checkpoint"


def test_a_config_that_is_missing_or_too_large(folder: Path) -> None:
    os.truncate(folder / CONFIG_NAME, 2**20 + 1)
    assert "config.json: has 1,048,577 bytes, expected at most 1,048,576" in refusal(folder)
    (folder / CONFIG_NAME).unlink()
    assert refusal(folder) == f"{folder}: has no config.json"


def test_a_config_of_another_model_is_a_usage_error(folder: Path) -> None:
    edit_config(folder, model_type="deepseek_v3")
    with pytest.raises(UsageError, match="model_type is 'deepseek_v3', expected 'deepseek_v4'"):
        open_checkpoint(folder)


def test_counts_are_those_of_the_headers(folder: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(folder)
    assert Counter(entry.dtype for entry in checkpoint.tensors.values()) == Counter(
        {"F8_E8M0": 14, "F32": 10, "BF16": 8, "F8_E4M3": 8, "I8": 6, "I64": 1}
    )
    assert checkpoint.bytes == 1_416_472
