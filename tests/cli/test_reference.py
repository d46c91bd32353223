"""`v4quant reference`: JSON keys, what it writes, and what a tired person types."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.checkpoint.conversion import write_small
from v4quant.cli.main import main


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return write_small(tmp_path / "native", mtp=True)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.safetensors"
    safetensors.torch.save_file({"input_ids": torch.arange(20)}, path)
    return path


def test_writes_outputs_and_reports(native: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = native.parent / "out.safetensors"
    assert main(["reference", str(native), str(out), "--tokens", str(tokens), "--prefill", "16", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= {"tokens", "seconds", "peak_memory_bytes"}
    assert (result["tokens"], result["prefill"], result["layers"]) == (20, 16, [0, 0])
    assert result["peak_memory_bytes"] > 2**20
    found = safetensors.torch.load_file(out)
    assert found["logits"].shape[0] == 20
    assert found["mtp_logits"].shape[0] == 15
    assert bool(found["logits"].isfinite().all())


def test_text(native: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = native.parent / "out.safetensors"
    command = ["reference", str(native), str(out), "--tokens", str(tokens)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "20 tokens, 20 in the prefill and 0 decode steps" in said.out
    assert "peak memory" in said.out
    assert f"wrote {out}" in said.out
    assert main(command) == 5
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_stored_arithmetic_differs_for_bf16(native: Path, tokens: Path) -> None:
    folder = native.parent
    assert main(["convert", str(native), str(folder / "bf16"), "--to", "bf16"]) == 0
    logits = {}
    for arithmetic in ("release", "stored"):
        out = folder / f"{arithmetic}.safetensors"
        command = ["reference", str(folder / "bf16"), str(out), "--tokens", str(tokens), "--arithmetic", arithmetic]
        assert main(command) == 0
        logits[arithmetic] = safetensors.torch.load_file(out)["logits"]
    assert not torch.equal(logits["release"], logits["stored"])


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--prefill", "0"], 2, "Input should be greater than or equal to 1"),
        (["--prefill", "21"], 2, "prefill is 21, expected 1 to the 20 tokens"),
        (["--layers", "1"], 2, "layers are 1-1, expected a part of 0-0"),
        (["--layers", "0-"], 2, "--layers is '0-', expected a layer or a range"),
        (["--layers", "a"], 2, "--layers is 'a'"),
        (["--arithmetic", "fp8"], 2, "--arithmetic is 'fp8', expected release or stored"),
        (["--device", "gpu"], 2, "--device is 'gpu', expected cpu or cuda"),
        (["--tokens", "nowhere.safetensors"], 2, "nowhere.safetensors: no such file"),
    ],
)
def test_wrong_options(
    native: Path, tokens: Path, arguments: list[str], exit_code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = native.parent / "out.safetensors"
    command = ["reference", str(native), str(out), "--tokens", str(tokens), *arguments]
    assert main(command) == exit_code
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("ids", "exit_code", "message"),
    [
        (torch.tensor([1, 10**6]), 2, "token 1 is 1000000, expected 0 to"),
        (torch.tensor([-1]), 2, "token 0 is -1"),
        (torch.zeros(0, dtype=torch.int64), 2, "prefill is 0"),
        (torch.zeros(2, 3, dtype=torch.int64), 2, "expected one row"),
        (torch.tensor(5), 2, "input_ids has shape [], expected one row"),
        (torch.zeros(3, dtype=torch.float16), 3, "input_ids is F16, expected I64 or I32"),
    ],
)
def test_wrong_tokens(
    native: Path, tokens: Path, ids: torch.Tensor, exit_code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.torch.save_file({"input_ids": ids}, tokens)
    out = native.parent / "out.safetensors"
    assert main(["reference", str(native), str(out), "--tokens", str(tokens)]) == exit_code
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("out", "exit_code", "message"),
    [
        ("out", 2, "expected a file name that ends in .safetensors"),
        ("missing/out.safetensors", 5, "no such folder"),
        ("tokens.safetensors", 2, "is the file of tokens itself"),
        ("native/model-00001-of-00003.safetensors", 2, "lies in the checkpoint that is read"),
    ],
)
def test_wrong_outputs(
    native: Path, tokens: Path, out: str, exit_code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tokens.read_bytes()
    command = ["reference", str(native), str(native.parent / out), "--tokens", str(tokens), "--overwrite"]
    assert main(command) == exit_code
    assert message in capsys.readouterr().err
    assert tokens.read_bytes() == before


def test_damaged_weights(native: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in native.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    out = native.parent / "out.safetensors"
    assert main(["reference", str(native), str(out), "--tokens", str(tokens)]) == 3
    assert "truncated" in capsys.readouterr().err
    assert main(["reference", str(native / "nowhere"), str(out), "--tokens", str(tokens)]) == 3
