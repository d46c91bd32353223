"""docs/cli.md says what the commands say of themselves."""

from pathlib import Path

import pytest

from tests.cli.command_reference import command_reference, help_of
from v4quant.cli.main import app

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_document_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # restored afterwards
    assert DOCUMENT.read_text(encoding="utf-8") == command_reference(), "run: make docs"


def test_every_help_has_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert len(names) >= 13
    for name in names:
        assert f"\n  v4quant {name} " in help_of(name)
