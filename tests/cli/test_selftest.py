"""`v4quant selftest`: the table, blind spots said aloud, and nothing left behind."""

import json
from pathlib import Path

import pytest

from tests.model.references import named
from v4quant.cli.main import main
from v4quant.parity.selftest.corruptions import CORRUPTIONS

FOLDER = named("tiny-base").folder
PLANTED = ["attn-sink-zero", "norm-bit-flipped", "tensor-lost", "torch-dtype-float16", "fp4-code-flipped"]


def run(*arguments: str) -> int:
    only = [part for name in PLANTED for part in ("--only", name)]
    return main(["selftest", str(FOLDER), *only, *arguments])


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--work", str(tmp_path / "work")) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["no-fault"].endswith("nothing, as it should be")
    assert lines["attn-sink-zero"].split()[1:4] == ["-", "caught", "caught"]
    assert lines["norm-bit-flipped"].split()[1:4] == ["-", "caught", "-"]
    assert lines["tensor-lost"].split()[1:4] == ["caught", "caught", "-"]
    assert lines["torch-dtype-float16"].endswith("NONE: blind")
    assert "blind: torch-dtype-float16: " in lines["blind:"]
    assert "no expert is stored in FP4" in lines["not"]
    assert not list(tmp_path.iterdir()), "copies are removed"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["planted"], found["false_alarms"], found["blind"]) == (4, [], ["torch-dtype-float16"])
    assert found["caught"] == {"inspect": 1, "verify": 3, "parity": 1}
    rows = {row["corruption"]: row for row in found["rows"]}
    assert rows["no-fault"]["parity"] == {"caught": False, "reason": "identical"}
    assert rows["norm-bit-flipped"]["parity"]["reason"].startswith("indistinguishable")
    assert "layer" in rows["attn-sink-zero"]["parity"]["reason"]


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", str(FOLDER), "--only", "sinks"]) == 2
    assert "--only is 'sinks', expected one of" in capsys.readouterr().err
    assert main(["selftest", str(FOLDER), "--work", str(FOLDER / "work")]) == 2
    assert main(["selftest", str(tmp_path / "nothing")]) == 3
    (tmp_path / "sound").mkdir()
    assert run("--work", str(tmp_path)) == 5
    assert (tmp_path / "sound").is_dir(), "what was there stays"


def test_there_are_enough() -> None:
    assert len(CORRUPTIONS) >= 90
