"""Parity reports that were mixed up or edited: whose they are, and whether they agree with themselves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub.conftest import Chain
from tests.hub.server import TestHub
from tests.hub.test_push import REPO, flip, push, result_of, write_report
from v4quant.cli.main import main

Change = Callable[[dict[str, Any]], object]


def refused(chain: Chain, capsys: pytest.CaptureFixture[str], report: Path) -> str:
    """What push says of a report that it does not take."""
    capsys.readouterr()
    assert main(["push", str(chain.fp8), REPO, "--parity", str(report)]) == 1
    return capsys.readouterr().err


OTHERS: list[Change] = [
    lambda evidence: evidence["reference"].update(source_id="1" * 64),
    lambda evidence: evidence.update(reference=None),
    lambda evidence: evidence.update(reference=None, reference_outputs={"path": "x", "sha256": "0" * 64}),
    lambda evidence: evidence.update(reference=None, reference_outputs={"source_id": "1" * 64}),
]


@pytest.mark.parametrize("change", OTHERS)
def test_it_compares_with_the_source_of_the_certificate(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change
) -> None:
    report = write_report(chain, tmp_path / "parity.json", lambda report: change(report["evidence"]))
    assert "than the certificate's source" in refused(chain, capsys, report)
    assert hub.requests == []


def test_a_copy_of_it_packed_anew_is_no_source(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has another source id, and computes the same by its making."""
    copy = tmp_path / "copy"
    assert main(["convert", str(chain.fp8), str(copy), "--to", "fp8", "--max-shard-size", "300KB"]) == 0
    assert main(["parity", str(chain.fp8), "--against", str(copy), "--report", str(tmp_path / "report")]) == 0
    assert "than the certificate's source" in refused(chain, capsys, tmp_path / "report" / "parity.json")
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
def test_outputs_that_were_stored_speak_for_their_source(chain: Chain, tmp_path: Path) -> None:
    source = json.loads(chain.report.read_text())["evidence"]["reference"]["source_id"]
    change: Change = lambda report: report["evidence"].update(reference=None, reference_outputs={"source_id": source})  # noqa: E731
    report = write_report(chain, tmp_path / "parity.json", change)
    assert main(["push", str(chain.fp8), REPO, "--parity", str(report), "--dry-run"]) == 0


EDITED: list[Change] = [
    lambda report: report.update(kl_mean=5.0),
    lambda report: (report.update(kl_mean=5.0), report["logits"]["kl"].update(mean=5.0)),
    lambda report: (report.update(kl_mean=-1.0), report["logits"]["kl"].update(mean=-1.0)),
    lambda report: (report.update(top1=0.5), report["logits"].update(top1=0.5)),
    lambda report: report.update(top1=0.9),
    lambda report: report["logits"].update(bit_equal=0.5),
    lambda report: report["noise_floor"].update(margin=300.0),
    lambda report: report["departures"].append({"figure": "kl_mean"}),
    lambda report: report["layers"][0].update(departs=True),
    lambda report: report["layers"][0].pop("departs"),
]


@pytest.mark.parametrize("verdict", ["identical", "indistinguishable"])
@pytest.mark.parametrize("number", range(len(EDITED)))
def test_its_verdict_follows_from_its_figures(
    hub: TestHub, chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, verdict: str
) -> None:
    def change(report: dict[str, Any]) -> None:
        EDITED[number](report)
        report.update(verdict=verdict)

    report = write_report(chain, tmp_path / "parity.json", change)
    if verdict == "indistinguishable" and EDITED[number] is EDITED[5]:  # as it may be
        assert main(["push", str(chain.fp8), REPO, "--parity", str(report), "--dry-run"]) == 0
    else:
        assert "contradicts itself" in refused(chain, capsys, report)
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    "change",
    [
        lambda report: report["noise_floor"].pop("limits"),
        lambda report: report["logits"].update(kl=7),
        lambda report: report.update(layers=["x"]),
        lambda report: report.update(departures=None),
    ],
)
def test_what_is_no_report(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change) -> None:
    assert "is no parity report" in refused(chain, capsys, write_report(chain, tmp_path / "parity.json", change))


@pytest.mark.usefixtures("hub")
def test_the_card_of_other_bytes_does_not_show_the_report(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Config, headers and certificate are those of the report, the bytes are not."""
    folder = shutil.copytree(chain.fp8, tmp_path / "fp8")
    flip(folder)
    assert push(chain, "--force-unverified", "--dry-run", "--json", folder=folder) == 0
    result = result_of(capsys)
    assert "no certificate fits" in " ".join(result["refusals"])
    assert "## Parity" not in result["card"]
    assert "## Exactness" not in result["card"]
    assert "v4quant.parity.json" not in {row["name"] for row in result["file_sizes"]}


@pytest.mark.usefixtures("hub")
def test_a_report_says_nothing_of_bytes_without_certificate(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report of a checkpoint of the same headers and other weights fits as well."""
    report = tmp_path / "report"
    assert main(["parity", str(chain.source), "--against", str(chain.fp8), "--report", str(report)]) == 0
    capsys.readouterr()
    command = ["push", str(chain.source), REPO, "--parity", str(report / "parity.json")]
    assert main(command) == 1
    assert "no certificate fits" in capsys.readouterr().err
    assert main([*command, "--force-unverified", "--dry-run", "--json"]) == 0
    assert "## Parity" not in result_of(capsys)["card"]
