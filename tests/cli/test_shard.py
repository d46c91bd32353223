"""`v4quant shard` and `v4quant merge`: JSON keys, streams, options, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.sharding import write_wide
from v4quant.cli.main import main
from v4quant.testing.asserts import assert_same_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("shard") / "source")


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Run a command that succeeds, and parse what must be one JSON object."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def payload(folder: Path) -> int:
    """Bytes of tensor data in the safetensors files of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        total += len(data) - 8 - int.from_bytes(data[:8], "little")
    return total


def test_json_has_its_keys(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    done = run_json(capsys, "shard", source, tmp_path / "mp4", "--tp", 4)
    assert done["ranks"] == 4
    assert done["tensors"] == len(index["weight_map"])
    assert done["bytes_written"] == payload(tmp_path / "mp4")
    assert done["bytes_read"] == index["metadata"]["total_size"]
    merged = run_json(capsys, "merge", tmp_path / "mp4", tmp_path / "back")
    assert merged["ranks"] == 4
    assert merged["tensors"] == len(index["weight_map"])
    assert merged["bytes_written"] == index["metadata"]["total_size"]
    assert merged["files"] == sum(path.is_file() for path in source.rglob("*"))
    assert_same_checkpoint(tmp_path / "back", source)


@pytest.mark.parametrize("experts", ["stored", "fp8"])
def test_dry_run_says_the_same_and_writes_nothing(
    experts: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["shard", source, out, "--tp", 2, "--experts", experts]
    plan = run_json(capsys, *command, "--dry-run")
    assert not out.exists()
    assert 0 < plan["peak_memory_bytes"] < 2**30
    done = run_json(capsys, *command)
    for key in ("ranks", "tensors", "bytes_read", "bytes_written", "experts"):
        assert plan[key] == done[key]
    assert plan["experts"] == experts
    assert plan["disk_bytes"] >= sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def test_people_read_the_plan_and_the_next_command(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shard", str(source), str(tmp_path / "mp2"), "--tp", "2"]) == 0
    printed = capsys.readouterr()
    for part in ("native -> 2 ranks", "model0-mp2.safetensors:", "model1-mp2.safetensors:", "extra.safetensors:"):
        assert part in printed.out
    assert printed.err == f"next: v4quant merge {tmp_path / 'mp2'} OUT gives back the checkpoint, byte for byte\n"
    assert main(["merge", str(tmp_path / "mp2"), str(tmp_path / "back")]) == 0
    printed = capsys.readouterr()
    assert "2 ranks -> 6 weight files" in printed.out
    assert "13 files, each with its old sha256" in printed.out
    assert printed.err == f"next: v4quant inspect {tmp_path / 'back'}\n"


def test_explain_lists_every_number(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run_json(capsys, "shard", source, tmp_path / "out", "--explain")
    assert told["works"] == [1, 2, 4, 8]
    assert [size["ranks"] for size in told["sizes"]] == list(range(1, 65))
    for size in told["sizes"]:
        assert size["works"] == (not size["forbidden_by"]) == (size["ranks"] in told["works"])
    forbidding = {found["tensor"] for found in told["sizes"][15]["forbidden_by"]}
    assert {"layers.0.attn.attn_sink", "layers.0.attn.wo_a.weight", "layers.0.ffn.experts.0.w1.weight"} <= forbidding
    assert main(["shard", str(source), str(tmp_path / "out"), "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "--tp 8   works" in lines
    assert "--tp 16  no: layers.0.attn.attn_sink: 8 attention heads do not divide by 16 (and 8 more)" in lines
    assert lines[-1] == "these work: 1, 2, 4, 8"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "--tp is missing"),
        (["--tp", "0"], "--tp"),
        (["--tp", "two"], "--tp"),
        (["--tp", "3"], "These work, up to 64: 1, 2, 4, 8."),
        (["--tp", "3", "--dry-run"], "--tp 3 does not work: embed.weight: 512 tokens of the vocabulary"),
        (["--tp", "2", "--experts", "fp4"], "--experts"),
    ],
)
def test_wrong_options(
    more: list[str], says: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shard", str(source), str(tmp_path / "out"), *more]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_kept_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write_wide(tmp_path / "own", layers=1)
    (own / "pytorch_model.bin").write_bytes(b"no")
    assert main(["shard", str(own), str(tmp_path / "out"), "--tp", "2"]) == 0
    assert "not kept, as it may hold weights in another form: pytorch_model.bin" in capsys.readouterr().err
