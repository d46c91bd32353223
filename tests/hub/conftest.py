"""The test Hub for every test in this folder, huggingface_hub pointed at it, and no waiting."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import close_session

from tests.checkpoint.conversion import convert, write_small
from tests.hub.server import TOKEN, TestHub, running
from v4quant.cli.main import main
from v4quant.hub import retry
from v4quant.hub.origin import Origin, note_source
from v4quant.parity.report.plots import canvas


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestHub]:
    """A Hub of this test's own, and an account there."""
    with running(tmp_path / "hub-store") as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url())
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf-home"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "hf-home" / "token"))
        waits: list[float] = []
        monkeypatch.setattr(retry, "sleep", waits.append)
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waits.append))
        found.waits = waits
        yield found
        close_session()


@pytest.fixture(scope="session", autouse=True)
def drawn_once() -> Iterator[None]:
    """Draw the pictures of a report once: they take half of a push, and most tests publish the same."""
    pictures: dict[str, bytes] = {}
    to_png = canvas.to_png

    def remembered(draw: Callable[..., Any], report: Mapping[str, Any]) -> bytes:
        key = f"{draw.__name__} {json.dumps(report, sort_keys=True)}"
        if key not in pictures:
            pictures[key] = to_png(draw, report)
        return pictures[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(canvas, "to_png", remembered)
        yield


@dataclass(frozen=True)
class Chain:
    """A checkpoint, its conversion, and the parity report of both; tests copy what they change."""

    source: Path
    fp8: Path
    report: Path


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    root = tmp_path_factory.mktemp("chain")
    source = write_small(root / "source", mtp=True)
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en, zh]\n---\n# Source\n")
    convert(source, root / "fp8", "fp8")
    note_source(root / "fp8", Origin("me/source", None, "c" * 40))
    command = ["parity", str(root / "fp8"), "--against", str(source), "--report", str(root / "report")]
    assert main(command) == 0
    return Chain(source, root / "fp8", root / "report" / "parity.json")
