"""The test Hub for every test in this folder, huggingface_hub pointed at it, and no waiting."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from huggingface_hub import close_session

from tests.hub.server import TOKEN, TestHub, running
from v4quant.hub import retry


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
