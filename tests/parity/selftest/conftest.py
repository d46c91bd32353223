"""Tiny checkpoints in every stored form, each made once a run."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.checkpoint.conversion import convert
from v4quant.testing.releases import synth_config
from v4quant.testing.synth import write_checkpoint

# Releases that are synthesised, and forms that are converted from "flash".
RELEASES = ("flash", "pro", "flash-base", "pro-base", "flash-0731", "pro-0813")
CONVERTED = ("fp8", "bf16", "base")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny checkpoint: a release, or "fp8", "bf16", "base" for Flash converted. Not to be written to."""
    root = tmp_path_factory.mktemp("tiny")

    @cache
    def folder(kind: str) -> Path:
        out = root / kind
        if kind in CONVERTED:
            convert(folder("flash"), out, kind)
        else:
            write_checkpoint(out, *synth_config(kind, tiny=True))
        return out

    return folder
