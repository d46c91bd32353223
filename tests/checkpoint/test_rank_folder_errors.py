"""Folders of ranks that are missing, doubled, swapped, edited, or of another run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.sharding import split, write_wide
from v4quant.checkpoint.reader import SHARDS_NAME
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.cli.main import main

SECOND = "rank-001"


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Splits of one checkpoint, and one of a checkpoint with other numbers."""
    root = tmp_path_factory.mktemp("others")
    source, other = write_wide(root / "source"), write_wide(root / "other", seed=1)
    split(source, root / "same", Grid(2, 2))
    split(other, root / "seed", Grid(2, 2))
    split(source, root / "eight", Grid(2, 2, 2))
    split(source, root / "turned", Grid(4, 1))
    return {path.name: path for path in root.iterdir()}


Break = Callable[[Path, dict[str, Path]], object]


def take(other: str, name: str, new: str = "") -> Break:
    """Put a rank's folder, or a file, of another split into this one."""

    def change(folder: Path, others: dict[str, Path]) -> None:
        target = folder / (new or name)
        if (others[other] / name).is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(others[other] / name, target)
        else:
            shutil.copy(others[other] / name, target)

    return change


def swap(folder: Path, _: dict[str, Path]) -> None:
    (folder / "rank-000").rename(folder / "x")
    (folder / SECOND).rename(folder / "rank-000")
    (folder / "x").rename(folder / SECOND)


def edit_record(folder: Path, _: dict[str, Path]) -> None:
    path = folder / SECOND / SHARDS_NAME
    record = json.loads(path.read_text())
    record["experts"] = [0, 2]
    path.write_text(json.dumps(record))


CASES: dict[str, tuple[Break, str]] = {
    "a rank is missing": (lambda folder, _: shutil.rmtree(folder / SECOND), "expected 4 folders of ranks"),
    "a file of a rank is missing": (
        lambda folder, _: (folder / SECOND / "model-00002-of-00006.safetensors").unlink(),
        "rank-001/model-00002-of-00006.safetensors: is missing",
    ),
    "a rank renamed": (
        lambda folder, _: (folder / SECOND).rename(folder / "rank-1"),
        "rank-1/model-00001-of-00006.safetensors: holds rank 1 of 4, expected rank-000 to rank-003",
    ),
    "a rank doubled": (
        lambda folder, _: shutil.copytree(folder / SECOND, folder / "rank-001 (copy)"),
        "rank-001 (copy)/model-00001-of-00006.safetensors: holds rank 1 of 4",
    ),
    "a rank in the place of another": (take("same", "rank-000", SECOND), "holds rank 0, expected rank 1"),
    "ranks swapped": (swap, "rank-000/model-00001-of-00006.safetensors: holds rank 1, expected rank 0"),
    "a rank of another checkpoint": (take("seed", SECOND), "is of another run"),
    "a rank of another number of ranks": (
        take("eight", SECOND),
        "rank-001/model-00001-of-00003.safetensors: holds rank 1 of 8",
    ),
    "a rank of another grid": (take("turned", SECOND), "is of another run"),
    "the record of another checkpoint": (take("seed", SHARDS_NAME), "v4quant.extra.safetensors: is of another run"),
    "what a rank holds, edited": (edit_record, f"{SECOND}/{SHARDS_NAME}: is not the one that v4quant shard wrote"),
    "an index of another rank": (
        take("turned", f"{SECOND}/model.safetensors.index.json"),
        "rank-001/model.safetensors.index.json: is not the one",
    ),
    "a rank without config": (
        lambda folder, _: (folder / SECOND / "config.json").unlink(),
        "rank-001/config.json: is missing",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, others: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = CASES[case]
    folder = shutil.copytree(others["same"], tmp_path / "ranks")
    change(folder, others)
    for command in (["merge", str(folder), str(tmp_path / "out")], ["inspect", str(folder)]):
        assert main(command) == 3
        errors = capsys.readouterr().err
        assert said in errors
        assert "hint: " in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
