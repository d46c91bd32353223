"""`v4quant parity` and `v4quant reference` on what `v4quant shard` wrote, in one process and under torchrun."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tests
from tests.cli.test_broken_inputs import assert_one_clear_message
from tests.model.references import named, relative_error
from v4quant.cli.main import main

WHOLE = named("tiny-base").folder
ROOT = Path(tests.__file__).parents[1]
SHORT = ["--against", str(WHOLE), "--length", "30"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "mp2"
    assert main(["shard", str(WHOLE), str(folder), "--tp", "2"]) == 0
    return folder


def under_torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "v4quant"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Everything that is the same in every run of the same bits."""
    kept = result | {"evidence": None, "report": None}
    for layer in result["layers"]:
        layer.pop("seconds", None)
    return kept


def test_parity_in_one_process_and_in_two(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same figures to the last digit, and only the first process speaks."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(["parity", str(sharded), *SHORT, "--json"]) == 0
    finally:
        torch.set_num_threads(cores)
    virtual = json.loads(capsys.readouterr().out)
    assert virtual["verdict"] in ("identical", "indistinguishable")
    assert virtual["evidence"]["candidate"]["ranks"]["how"] == "virtual"
    report = tmp_path / "report"
    done = under_torchrun(2, "parity", str(sharded), *SHORT, "--json", "--report", str(report))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["evidence"]["candidate"]["ranks"] == {"how": "processes", "ranks": 2, "tp": 2, "ep": 1, "pp": 1}
    assert figures(result) == figures(virtual)
    assert "2 ranks (--tp 2 --ep 1 --pp 1), a process each" in (report / "report.html").read_text()


def test_text(sharded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", str(sharded), *SHORT]) == 0
    said = capsys.readouterr().out
    assert "the candidate was run by 2 ranks (--tp 2 --ep 1 --pp 1), threads of one process" in said


def test_reference(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tmp_path / "tokens.safetensors"
    safetensors.torch.save_file({"input_ids": torch.arange(20)}, tokens)
    outputs = []
    for source in (WHOLE, sharded):
        out = tmp_path / f"{source.name}.safetensors"
        assert main(["reference", str(source), str(out), "--tokens", str(tokens), "--prefill", "16"]) == 0
        outputs.append(safetensors.torch.load_file(out))
    assert outputs[0].keys() == outputs[1].keys()
    assert "mtp_logits" in outputs[0]
    for name, expected in outputs[0].items():
        assert relative_error(outputs[1][name], expected) < 0.02, name
    assert "wrote" in capsys.readouterr().out


@pytest.mark.slow
def test_other_numbers_of_processes(sharded: Path) -> None:
    """One message, whichever process is the first to say it, and the exit code of torchrun."""
    done = under_torchrun(3, "parity", str(sharded), *SHORT)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
    assert said[0].startswith("error: 3 processes were started for a checkpoint of 2 ranks")
    assert said[1].startswith("hint: Start it with: torchrun --nproc-per-node 2 -m v4quant")
    assert len(said) == 2
    assert not done.stdout


def missing(folder: Path) -> None:
    (folder / "model1-mp2.safetensors").unlink()


def doubled(folder: Path) -> None:
    shutil.copy(folder / "model0-mp2.safetensors", folder / "model1-mp2.safetensors")


def of_another_number(folder: Path) -> None:
    assert main(["shard", str(WHOLE), str(folder.parent / "mp1"), "--tp", "1"]) == 0
    shutil.copy(folder.parent / "mp1" / "model0-mp1.safetensors", folder)


def of_another_run(folder: Path) -> None:
    other = named("tiny-flash").folder
    assert main(["shard", str(other), str(folder.parent / "other"), "--tp", "2"]) == 0
    shutil.copy(folder.parent / "other" / "model1-mp2.safetensors", folder)


FAULTS = {
    missing: "model1-mp2.safetensors: is missing",
    doubled: "holds rank 0, expected rank 1",
    of_another_number: "model0-mp1.safetensors: holds rank 0 of 1",
    of_another_run: "is of another run",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", ["parity", "reference"])
def test_sets_that_are_none(
    command: str, fault: Any, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(sharded, tmp_path / "mp2")
    fault(folder)
    capsys.readouterr()
    rest = SHORT if command == "parity" else [str(tmp_path / "out.safetensors"), "--tokens", "tokens.safetensors"]
    assert main([command, str(folder), *rest]) == 3
    said = capsys.readouterr().err
    assert_one_clear_message(said)
    assert FAULTS[fault] in said


def test_a_whole_checkpoint_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    from v4quant.checkpoint.process_group import ProcessGroup
    from v4quant.checkpoint.reader import open_checkpoint
    from v4quant.cli._ranks import processes_of
    from v4quant.errors import UsageError

    group = ProcessGroup()
    monkeypatch.setattr(group, "size", 2)
    with (
        pytest.raises(UsageError, match=r"2 processes were started, but .* is a whole checkpoint"),
        processes_of(open_checkpoint(WHOLE), group, torch.device("cpu")),
    ):
        pass
