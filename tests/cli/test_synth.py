"""`v4quant synth`: exit codes, JSON keys, what goes to which stream."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from v4quant.cli.main import main

SMALL = ["--like", "flash", "--tiny", "--layers", "1", "--experts", "2"]


def test_writes_a_checkpoint_and_says_what_is_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["synth", str(out), *SMALL]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("wrote ")
    assert printed.err == f"next: v4quant inspect {out}\n"
    assert (out / "config.json").is_file()


def test_json_has_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", str(tmp_path), *SMALL, "--seed", "7", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert result["tensors"] == len(index["weight_map"])
    assert result["bytes"] == index["metadata"]["total_size"]
    assert result["seed"] == 7
    assert result["shards"] == len(result["files"]) == 4
    for file in result["files"]:
        assert (tmp_path / file["name"]).stat().st_size == file["bytes"]
    assert result["disk_bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["synth", str(out), "--like", "flash", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "3,566,321,192 B  model-00002-of-00046.safetensors" in printed
    assert "would write 69,187 tensors, 159.61 GB in 46 shards" in printed
    assert main(["synth", str(out), "--like", "flash-base", "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["tensors"], result["bytes"]) == (69_189, 294_673_469_000)
    assert not out.exists()


def test_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["synth", str(tmp_path / name), *SMALL, "--seed", seed]) == 0
    a, b, c = (next((tmp_path / name).glob("model-00002*")).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_existing_output_is_refused_unless_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", str(tmp_path), *SMALL]) == 0
    for more in ([], ["--dry-run"]):
        assert main(["synth", str(tmp_path), *SMALL, *more]) == 5
        assert "is not empty" in capsys.readouterr().err
    assert main(["synth", str(tmp_path), *SMALL, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--like", "flush"], "flush"),
        ([], "--like"),
        (["--like", "flash", "--layers", "0"], "layers is 0, expected 1 to 43"),
        (["--like", "flash", "--tiny", "--experts", "9"], "experts is 9, expected 1 to 8"),
        (["--like", "flash", "--layers", "many"], "--layers"),
    ],
)
def test_bad_options_are_usage_errors(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["synth", str(tmp_path / "out"), *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_folder_should_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert main(["synth", str(tmp_path / "out"), *SMALL]) == 5
    assert main(["synth", str(tmp_path / "out" / "inside"), *SMALL]) == 5
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_exits_130_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "v4quant", "synth", str(out), "--like", "flash", "--layers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while not list(out.glob("*.partial")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert list(out.iterdir()) == []
