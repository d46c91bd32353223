"""`v4quant verify`: JSON keys, exit codes, and that damage is named with coordinate and values."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.conversion import write_small
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.cli.main import main

KEYS = {"ok", "tensors", "bit_identical", "value_exact", "rounded", "mismatches"}
WEIGHT = "layers.0.ffn.experts.1.w2.weight"


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return write_small(tmp_path / "native")


@pytest.fixture
def fp8(native: Path, tmp_path: Path) -> Path:
    assert main(["convert", str(native), str(tmp_path / "fp8"), "--to", "fp8"]) == 0
    return tmp_path / "fp8"


def flip_sign(folder: Path, tensor: str, position: int) -> None:
    """Flip the top bit of one stored byte."""
    entry = open_checkpoint(folder).tensors[tensor]
    with (folder / entry.file).open("r+b") as file:
        file.seek(entry.start + position)
        byte = file.read(1)[0]
        file.seek(entry.start + position)
        file.write(bytes([byte ^ 0x80]))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    exit_code = main(["verify", *arguments, "--json"])
    return exit_code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("against", [False, True])
def test_a_sound_conversion(native: Path, fp8: Path, against: bool, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, result = run(capsys, str(fp8), *(["--against", str(native)] if against else []))
    assert exit_code == 0
    assert result.keys() >= KEYS
    assert result["ok"] is True
    assert result["mismatches"] == []
    assert result["tensors"] == result["bit_identical"] + result["value_exact"] == len(open_checkpoint(fp8).tensors)


def test_damage_is_found_by_hash_and_by_value(native: Path, fp8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = open_checkpoint(fp8).tensors[WEIGHT].shape[1]
    flip_sign(fp8, WEIGHT, 3 * columns + 5)
    exit_code, result = run(capsys, str(fp8))
    assert (exit_code, result["ok"]) == (1, False)
    [mismatch] = result["mismatches"]
    assert mismatch["tensor"] == WEIGHT
    assert "sha256" in mismatch["reason"]
    exit_code, result = run(capsys, str(fp8), "--against", str(native))
    assert exit_code == 1
    [mismatch] = result["mismatches"]
    assert (mismatch["tensor"], mismatch["coordinate"]) == (WEIGHT, [3, 5])
    assert mismatch["found"] == -mismatch["expected"]


def test_people_read_the_mismatch_first(native: Path, fp8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_sign(fp8, WEIGHT, 0)
    capsys.readouterr()
    assert main(["verify", str(fp8), "--against", str(native)]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(f"MISMATCH {WEIGHT}: 1 of ")
    assert "first at [0, 0]" in printed.out
    assert "\nNOT ok: " in printed.out
    assert printed.err.startswith("error: ")


def test_the_source_has_no_certificate(native: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(native)]) == 3
    assert "--against" in capsys.readouterr().err


def test_another_model_is_no_source(fp8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_small(tmp_path / "other", seed=1)
    exit_code, result = run(capsys, str(fp8), "--against", str(other))
    assert exit_code == 1
    assert len(result["mismatches"]) > 10
