"""Faults that a review found: each would lose or change something without a word."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from v4quant.checkpoint.certificate import CERTIFICATE_NAME
from v4quant.checkpoint.reader import JOURNAL_NAME, open_checkpoint
from v4quant.cli.main import main
from v4quant.errors import OutputError

from .conversion import convert, write_small

WEIGHT = "layers.0.ffn.experts.1.w2.weight"


def off_the_grid(folder: Path) -> None:
    entry = open_checkpoint(folder).tensors[WEIGHT]
    np.memmap(folder / entry.file, np.uint16, "r+", entry.start, entry.shape)[0, :8] ^= 3


def test_rounding_that_an_interrupted_run_was_allowed_is_refused_without_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native, bf16, out = write_small(tmp_path / "native"), tmp_path / "bf16", tmp_path / "out"
    convert(native, bf16, "bf16")
    off_the_grid(bf16)
    command = ["convert", str(bf16), str(out), "--to", "native"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "v4quant.checkpoint.apply.write_side_files", lambda *_: (_ for _ in ()).throw(OutputError("full"))
        )
        assert main([*command, "--allow-rounding"]) == 5
    assert (out / JOURNAL_NAME).is_file()
    capsys.readouterr()
    assert main([*command, "--json"]) == 1
    printed = capsys.readouterr()
    assert [record["tensor"] for record in json.loads(printed.out)["would_round"]] == [WEIGHT]
    assert not (out / "config.json").exists()
    assert main([*command, "--allow-rounding"]) == 0


def test_demo_removes_nothing_that_no_demo_wrote(tmp_path: Path) -> None:
    mine = write_small(tmp_path / "models" / "native")
    assert main(["demo", str(tmp_path / "models"), "--overwrite"]) == 5
    assert open_checkpoint(mine).problems == []


def test_a_linked_folder_in_the_output_is_not_written_through(tmp_path: Path) -> None:
    native, out = write_small(tmp_path / "native"), tmp_path / "out"
    before = (native / "inference" / "config.json").read_bytes()
    out.mkdir()
    (out / "inference").symlink_to(native / "inference")
    assert main(["convert", str(native), str(out), "--to", "bf16", "--overwrite"]) == 5
    assert (native / "inference" / "config.json").read_bytes() == before


def test_an_empty_journal_opens_no_door(tmp_path: Path) -> None:
    native, out = write_small(tmp_path / "native"), tmp_path / "out"
    convert(native, out, "fp8")
    (out / JOURNAL_NAME).touch()
    assert main(["convert", str(native), str(out), "--to", "bf16"]) == 5
    assert open_checkpoint(out).scheme.name == "fp8"


def test_an_edited_config_or_certificate_is_found_beside_right_values(tmp_path: Path) -> None:
    native, out = write_small(tmp_path / "native"), tmp_path / "out"
    convert(native, out, "fp8")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rope_theta": 77}))
    assert main(["verify", str(out), "--against", str(native)]) == 1
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    assert main(["verify", str(out), "--against", str(native)]) == 0
    path = out / CERTIFICATE_NAME
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"sha256": "0" * 64})
    path.write_text("\n".join(lines) + "\n")
    assert main(["verify", str(out), "--against", str(native)]) == 1


def test_an_original_that_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native, bf16, out = write_small(tmp_path / "native"), tmp_path / "bf16", tmp_path / "out"
    convert(native, bf16, "bf16")
    command = ["convert", str(bf16), str(out), "--to", "native", "--like", str(native)]
    with monkeypatch.context() as patch:
        patch.setattr(
            "v4quant.checkpoint.apply.write_side_files", lambda *_: (_ for _ in ()).throw(OutputError("full"))
        )
        assert main(command) == 5
    entry = open_checkpoint(native).tensors[WEIGHT]
    times = (native / entry.file).stat()
    with (native / entry.file).open("r+b") as file:
        file.seek(entry.start)
        file.write(b"\x77")
    os.utime(native / entry.file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main(command) == 3


def test_too_wide_a_matrix_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native = write_small(tmp_path / "native")
    config = json.loads((native / "config.json").read_text())
    wide = config | {"num_attention_heads": 4096, "head_dim": 16384, "o_groups": 1}
    (native / "config.json").write_text(json.dumps(wide))
    assert main(["inspect", str(native)]) == 2
    assert "num_attention_heads * head_dim is 67,108,864, expected at most 262,144" in capsys.readouterr().err


def test_files_left_behind_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native, out = write_small(tmp_path / "native"), tmp_path / "out"
    (native / "weights.BIN").write_bytes(b"pickle")
    assert main(["convert", str(native), str(out), "--to", "bf16"]) == 0
    assert "not copied, as it may hold weights in another form: weights.BIN" in capsys.readouterr().err
    assert not (out / "weights.BIN").exists()
