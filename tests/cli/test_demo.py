"""`v4quant demo`: every step holds, and a step that does not makes it fail."""

import json
from pathlib import Path

import pytest

from v4quant.checkpoint import verify
from v4quant.checkpoint.verify_report import VerifyReport
from v4quant.cli.main import main


def test_proves_each_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr()
    assert "NOT OK" not in printed.out
    assert "proved: fp8 holds every value of the original" in printed.out
    assert main(["demo", str(tmp_path / "demo")]) == 5
    capsys.readouterr()
    assert main(["demo", str(tmp_path / "demo"), "--overwrite", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is True
    assert result["steps"][0]["step"] == "synth"
    assert all(step["ok"] for step in result["steps"])


def test_a_verifier_that_finds_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "verify_values", lambda _out, _source: VerifyReport())
    assert main(["demo", str(tmp_path / "demo")]) == 1
    printed = capsys.readouterr()
    assert "nothing was found" in printed.out
    assert "proved:" not in printed.out
