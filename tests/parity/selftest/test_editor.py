"""A copy differs from the original by its edits and by nothing else, and the original is never written to."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.selftest.copies import hashes, reduced, tensors
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.config import CONFIG_NAME
from v4quant.errors import OutputError
from v4quant.parity.selftest.editor import Editor

NORM = "layers.0.attn_norm.weight"
EXPERT = "layers.0.ffn.experts.0.w1.weight"
SHARD = "model-00002-of-00006.safetensors"  # layer 0
LAST = "model-00006-of-00006.safetensors"  # the MTP block


@pytest.fixture
def original(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return reduced(tiny("flash"), tmp_path / "original")


@pytest.fixture
def editor(original: Path) -> Editor:
    return Editor(open_checkpoint(original))


@pytest.fixture(autouse=True)
def unwritten(original: Path) -> Any:
    """Whatever a test does, the original keeps its bytes."""
    before = hashes(original)
    yield
    assert hashes(original) == before


def bump(editor: Editor, name: str = NORM) -> None:
    values = editor.read(name)
    values[-1] += 1
    editor.write(name, values)


def test_without_edits_every_file_is_a_link(editor: Editor, original: Path, tmp_path: Path) -> None:
    assert editor.finish(tmp_path / "copy") == []
    assert hashes(tmp_path / "copy") == hashes(original)
    for path in original.iterdir():
        assert path.samefile(tmp_path / "copy" / path.name)


def test_one_changed_tensor(editor: Editor, original: Path, tmp_path: Path) -> None:
    bump(editor)
    assert editor.finish(tmp_path / "copy") == [SHARD]
    before, after = tensors(original), tensors(tmp_path / "copy")
    assert before.keys() == after.keys()
    assert [key for key in before if before[key] != after[key]] == [(SHARD, NORM)]
    gains = [torch.frombuffer(bytearray(t[SHARD, NORM][2]), dtype=torch.bfloat16) for t in (before, after)]
    assert torch.equal(gains[1][:-1], gains[0][:-1])
    assert gains[1][-1] == gains[0][-1] + 1
    assert open_checkpoint(tmp_path / "copy").problems == []
    assert (tmp_path / "copy" / SHARD).stat().st_nlink == 1
    assert (tmp_path / "copy" / LAST).stat().st_nlink == 2


def test_what_is_read_is_a_copy_and_shows_edits(editor: Editor, tmp_path: Path) -> None:
    editor.read(NORM).zero_()
    bump(editor)
    once = editor.read(NORM)
    bump(editor)
    assert editor.read(NORM)[-1] == once[-1] + 1
    assert editor.read(EXPERT).dtype == torch.uint8
    assert editor.read(EXPERT).shape == editor.checkpoint.tensors[EXPERT].shape
    assert editor.finish(tmp_path / "copy") == [SHARD]


def test_writing_the_same_values_is_no_change(editor: Editor, tmp_path: Path) -> None:
    editor.write(NORM, editor.read(NORM))
    editor.config.update(editor.checkpoint.config_json)
    assert editor.finish(tmp_path / "copy") == []


def test_another_dtype_and_shape(editor: Editor, tmp_path: Path) -> None:
    editor.write(NORM, editor.read(NORM).float().reshape(2, -1), "F32")
    assert editor.finish(tmp_path / "copy") == sorted([SHARD, INDEX_NAME])  # the total size is another
    stored = tensors(tmp_path / "copy")[SHARD, NORM]
    assert stored[:2] == ("F32", (2, 128))
    problems = [str(problem) for problem in open_checkpoint(tmp_path / "copy").problems]
    assert problems == [f"{NORM}: is stored as F32 [2, 128], expected BF16 [256]"]


def test_tensors_come_go_and_are_renamed(editor: Editor, original: Path, tmp_path: Path) -> None:
    editor.add("extra", "I64", torch.arange(3), SHARD)
    editor.remove(EXPERT)
    editor.rename(NORM, "renamed")
    assert editor.finish(tmp_path / "copy") == sorted([SHARD, INDEX_NAME])
    before, after = tensors(original), tensors(tmp_path / "copy")
    assert before.keys() - after.keys() == {(SHARD, EXPERT), (SHARD, NORM)}
    assert after.keys() - before.keys() == {(SHARD, "extra"), (SHARD, "renamed")}
    assert after[SHARD, "renamed"] == before[SHARD, NORM]
    assert after[SHARD, "extra"] == ("I64", (3,), torch.arange(3).numpy().tobytes())
    index = json.loads((tmp_path / "copy" / INDEX_NAME).read_text())
    assert index["weight_map"] == {name: file for file, name in after}
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in after.values())


def test_a_shard_without_tensors_is_left_out(editor: Editor, tmp_path: Path) -> None:
    for name in [name for name, parts in editor.checkpoint.parsed.items() if parts.block == "mtp"]:
        editor.remove(name)
    assert editor.finish(tmp_path / "copy") == sorted([LAST, INDEX_NAME])
    assert not (tmp_path / "copy" / LAST).exists()
    index = json.loads((tmp_path / "copy" / INDEX_NAME).read_text())
    assert LAST not in index["weight_map"].values()


def test_a_stale_index_stays_as_it_is(editor: Editor, original: Path, tmp_path: Path) -> None:
    editor.remove(NORM)
    editor.leave_index_stale()
    assert editor.finish(tmp_path / "copy") == [SHARD]
    assert hashes(tmp_path / "copy")[INDEX_NAME] == hashes(original)[INDEX_NAME]


def test_an_edited_index_and_config(editor: Editor, original: Path, tmp_path: Path) -> None:
    editor.edit_index(lambda index: index["weight_map"].pop(NORM))
    editor.config["rope_scaling"]["factor"] = 1
    assert editor.finish(tmp_path / "copy") == sorted([CONFIG_NAME, INDEX_NAME])
    index = json.loads((tmp_path / "copy" / INDEX_NAME).read_text())
    assert NORM not in index["weight_map"]
    assert editor.checkpoint.config_json["rope_scaling"]["factor"] == 16
    before, after = (json.loads((folder / CONFIG_NAME).read_text()) for folder in (original, tmp_path / "copy"))
    before["rope_scaling"]["factor"] = 1
    assert after == before


def test_files_are_removed_doubled_and_damaged(editor: Editor, original: Path, tmp_path: Path) -> None:
    editor.remove_file(LAST)
    editor.copy_file(SHARD, "second.safetensors")
    first = "model-00001-of-00006.safetensors"
    editor.damage_file(first, lambda path: os.truncate(path, 10))
    assert editor.finish(tmp_path / "copy") == [first, LAST, "second.safetensors"]
    before, after = hashes(original), hashes(tmp_path / "copy")
    assert after["second.safetensors"] == before[SHARD] == after[SHARD]
    assert LAST not in after
    assert (tmp_path / "copy" / first).read_bytes() == (original / first).read_bytes()[:10]
    assert not (tmp_path / "copy" / "second.safetensors").samefile(original / SHARD)


def test_damage_comes_after_edits_of_the_same_shard(editor: Editor, tmp_path: Path) -> None:
    bump(editor)
    editor.damage_file(SHARD, lambda path: path.write_bytes(path.read_bytes() + b"!"))
    assert editor.finish(tmp_path / "copy") == [SHARD]
    assert (tmp_path / "copy" / SHARD).read_bytes()[-1:] == b"!"


def test_without_links_files_are_copied(
    editor: Editor, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert editor.finish(tmp_path / "copy") == []
    assert hashes(tmp_path / "copy") == hashes(original)
    assert not any(path.samefile(tmp_path / "copy" / path.name) for path in original.iterdir())


def test_an_existing_folder_is_refused(editor: Editor, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    with pytest.raises(OutputError):
        editor.finish(tmp_path / "copy")
