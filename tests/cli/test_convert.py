"""`v4quant convert`: JSON keys, streams, the plan, options that a tired person mistypes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.conversion import write_small
from v4quant.cli._options import parse_size
from v4quant.cli.main import main
from v4quant.errors import UsageError

KEYS = {"format", "tensors", "bytes_read", "bytes_written", "seconds", "bit_identical", "value_exact", "rounded"}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("convert") / "native")


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run a command that succeeds, and parse what must be one JSON object."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_json_has_its_keys(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fp8"
    result = run_json(capsys, "convert", str(native), str(out), "--to", "fp8")
    assert KEYS | {"certificate"} <= result.keys()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert result["tensors"] == len(index["weight_map"])
    assert result["bytes_written"] == index["metadata"]["total_size"]
    assert result["tensors"] == result["bit_identical"] + result["value_exact"] + result["rounded"]
    assert result["rounded"] == 0 < result["value_exact"]
    assert Path(result["certificate"]) == out / "v4quant.certificate.jsonl"
    assert Path(result["certificate"]).is_file()


def test_dry_run_says_the_same_and_writes_nothing(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fp8"
    plan = run_json(capsys, "convert", str(native), str(out), "--to", "fp8", "--dry-run")
    assert not out.exists()
    assert 0 < plan["peak_memory_bytes"] < 2**30
    done = run_json(capsys, "convert", str(native), str(out), "--to", "fp8")
    for key in ("format", "tensors", "bytes_read", "bytes_written"):
        assert plan[key] == done[key]
    on_disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    # The certificate's size is the one thing that is estimated.
    assert plan["disk_bytes"] * 0.9 < on_disk < plan["disk_bytes"] * 1.1
    assert {risk["when"] for risk in plan["may_round"]} == {
        "if the scales of one 128x128 block spread by more than 2^14"
    }


def test_people_read_plan_verdicts_and_the_next_command(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bf16"
    capsys.readouterr()
    assert main(["convert", str(native), str(out), "--to", "bf16", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for part in ("native -> bf16", "fp4 -> bf16", "memory: at most", "disk: needs", "free", "may round: nothing"):
        assert part in printed
    assert main(["convert", str(native), str(out), "--to", "bf16"]) == 0
    done = capsys.readouterr()
    assert " 0 rounded" in done.out
    assert done.err == f"next: v4quant verify {out} --against {native}\n"


@pytest.mark.parametrize(
    ("more", "exit_code", "says"),
    [
        (["--to", "fp4"], 2, "fp4"),
        (["--to", "FP8"], 2, "Known formats: native"),
        ([], 2, "--to"),
        (["--to", "fp8", "--max-shard-size", "5"], 2, "--max-shard-size 5GB"),
        (["--to", "fp8", "--max-shard-size", "0GB"], 2, "more than nothing"),
        (["--to", "fp8", "--max-workers", "0"], 2, "--max-workers"),
        (["--to", "fp8", "--like", "nowhere"], 3, "nowhere: no such folder"),
    ],
)
def test_wrong_options(
    more: list[str], exit_code: int, says: str, native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(native), str(out), *more]) == exit_code
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not out.exists()


def test_like_must_be_the_original(native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bf16, other = tmp_path / "bf16", write_small(tmp_path / "other", "pro")
    assert main(["convert", str(native), str(bf16), "--to", "bf16"]) == 0
    for like, says in ((bf16, "is stored as bf16, expected native"), (other, "is another model")):
        capsys.readouterr()
        assert main(["convert", str(bf16), str(tmp_path / "out"), "--to", "native", "--like", str(like)]) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_free_is_refused(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, says in (("mine", "is not empty"), ("file", "is a file")):
        assert main(["convert", str(native), str(tmp_path / out), "--to", "fp8"]) == 5
        printed = capsys.readouterr()
        assert says in printed.err
        assert printed.out == ""
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    for inside in (native, native / "out"):
        assert main(["convert", str(native), str(inside), "--to", "fp8", "--overwrite"]) == 5
        assert "overlaps with the checkpoint that is read" in capsys.readouterr().err


def test_overwrite_replaces_the_checkpoint_and_leaves_the_rest(native: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(native), str(out), "--to", "bf16"]) == 0
    (out / "notes.txt").write_text("mine")
    assert main(["convert", str(native), str(out), "--to", "fp8"]) == 5
    assert main(["convert", str(native), str(out), "--to", "fp8", "--overwrite"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert main(["verify", str(out), "--against", str(native)]) == 0


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("100B", 100), ("2TB", 2 * 10**12), ("0.5KB", 500)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--max-shard-size") == size


@pytest.mark.parametrize("text", ["", "5", "GB", "5GiB", "-5GB", "5 GB GB", "1e9B", "0.1B", "9" * 40 + "GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--max-shard-size is"):
        parse_size(text, "--max-shard-size")


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_a_half_set_environment_of_torchrun(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = {"convert": [str(native), str(tmp_path / "out"), "--to", "fp8"], "verify": [str(native)]}[command]
    assert main([command, *argv]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: environment variable RANK is not set, expected a whole number from 0 to 1\n")
    assert not (tmp_path / "out").exists()
