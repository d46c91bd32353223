"""docs/cli.md says what the commands say of themselves."""

from pathlib import Path

import pytest

from tests.cli.command_reference import command_reference, help_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_document_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # restored afterwards
    assert DOCUMENT.read_text(encoding="utf-8") == command_reference(), "run: make docs"


def test_every_help_has_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    moves = ("download", "convert", "shard", "merge", "push")
    for name in (*moves, "inspect", "synth", "verify", "reference", "parity", "selftest", "demo"):
        assert f"\n  v4quant {name} " in help_of(name)
