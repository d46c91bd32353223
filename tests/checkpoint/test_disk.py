"""Disks and folders that refuse: full, too small, failing, in use, overlapping; and sources that change meanwhile."""

import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.conversion import convert, plan_of, write_small
from v4quant.checkpoint import output
from v4quant.checkpoint.journal import lock_journal
from v4quant.checkpoint.reader import JOURNAL_NAME, open_checkpoint
from v4quant.cli.main import main
from v4quant.errors import CheckpointError, OutputError
from v4quant.testing.asserts import assert_same_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("disk") / "source", mtp=True)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("expected") / "fp8"
    convert(source, out, "fp8")
    return out


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, number: int) -> None:
    """Let one call of a function of `os`, counted from 0, and all that follow fail with this errno."""
    original: Callable[..., Any] = getattr(os, name)
    calls = itertools.count()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= call:
            raise OSError(number, os.strerror(number))
        return original(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


def assert_nothing_false_looks_whole(out: Path, expected: Path) -> None:
    for path in out.rglob("*.safetensors"):
        assert path.read_bytes() == (expected / path.name).read_bytes()
    if (out / "config.json").exists():
        assert open_checkpoint(out).problems == []
    elif out.exists():
        with pytest.raises(CheckpointError):
            open_checkpoint(out)


@pytest.mark.parametrize(
    ("name", "calls", "number"),
    [
        ("posix_fallocate", range(4), errno.ENOSPC),
        ("pwrite", [0, 1, 2, 3, 10, 40, 70, 100, 130], errno.ENOSPC),
        ("pwrite", [0, 10, 50, 100], errno.EDQUOT),
        ("fsync", range(30), errno.ENOSPC),
        ("fsync", [0, 2, 5, 8], errno.EIO),
        ("replace", range(11), errno.ENOSPC),
        ("open", [0, 1, 2, 5, 10], errno.ENOSPC),
    ],
)
def test_a_disk_that_is_full_sooner_or_later(
    source: Path,
    expected: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    calls: list[int],
    number: int,
) -> None:
    """Whichever call fails: exit 5, one message, nothing that looks whole; with room again the same command goes on."""
    failed = 0
    for call in calls:
        out = tmp_path / str(call)
        command = ["convert", str(source), str(out), "--to", "fp8"]
        with pytest.MonkeyPatch.context() as monkeypatch:
            fail_at(monkeypatch, name, call, number)
            code = main(command)
        errors = capsys.readouterr().err
        if code == 0:
            break
        failed += 1
        assert code == (3 if "cannot read" in errors else 5), errors  # `open` may fail for the source, too
        assert errors.count("error:") == 1
        assert os.strerror(number) in errors
        assert_nothing_false_looks_whole(out, expected)
        assert not list(out.glob("*.partial"))
        complete = (out / "config.json").exists() and not (out / JOURNAL_NAME).exists()
        assert main(command) == (5 if complete else 0), (name, call, errors, capsys.readouterr().err)
        assert_same_checkpoint(out, expected)
        shutil.rmtree(out)
    assert failed > 3


def test_a_disk_that_is_too_small_is_refused_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan = tmp_path / "out", plan_of(source, "fp8")
    monkeypatch.setattr(output, "free_bytes", lambda _folder: plan.disk_bytes - 1)
    assert main(["convert", str(source), str(out), "--to", "fp8"]) == 5
    errors = capsys.readouterr().err
    assert f"needs {plan.disk_bytes:,} bytes, {plan.disk_bytes - 1:,} are free: 1 short" in errors
    assert "nothing was written" in errors
    assert not out.exists()
    monkeypatch.setattr(output, "free_bytes", lambda _folder: plan.disk_bytes)
    assert main(["convert", str(source), str(out), "--to", "fp8"]) == 0


def test_what_is_there_already_needs_no_room(
    source: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that continues needs room for the rest alone; one that overwrites, for what is more than was there."""
    out, plan = tmp_path / "out", plan_of(source, "fp8")
    with pytest.MonkeyPatch.context() as failing:
        fail_at(failing, "posix_fallocate", 3, errno.ENOSPC)
        with pytest.raises(OutputError):
            convert(source, out, "fp8", workers=1)
    done = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert done > 0
    monkeypatch.setattr(output, "free_bytes", lambda _folder: plan.disk_bytes - done - 1)
    with pytest.raises(OutputError, match="1 short"):
        convert(source, out, "fp8")
    monkeypatch.setattr(output, "free_bytes", lambda _folder: plan.disk_bytes - done)
    convert(source, out, "fp8")
    assert_same_checkpoint(out, expected)
    monkeypatch.setattr(output, "free_bytes", lambda _folder: 0)
    with pytest.raises(OutputError, match="short"):
        convert(source, out, "bf16", overwrite=True)  # larger than what it replaces
    assert_same_checkpoint(out, expected)


@pytest.mark.parametrize("inside", [".", "out", "out/deep", "..", "../.."])
def test_output_that_overlaps_the_source_is_refused(tmp_path: Path, inside: str) -> None:
    source = write_small(tmp_path / "a" / "b" / "source")
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"overlaps with the checkpoint that is read"):
            convert(source, source / inside, "fp8", overwrite=overwrite)
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(OutputError, match="overlaps"):
        convert(link, source / inside, "fp8", overwrite=True)
    link.unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_output_that_overlaps_the_original_is_refused(tmp_path: Path) -> None:
    original = write_small(tmp_path / "native")
    convert(original, tmp_path / "fp8", "fp8")
    with pytest.raises(OutputError, match="overlaps"):
        convert(tmp_path / "fp8", original / "again", "native", like=original)


def test_two_processes_at_once(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    other = lock_journal(out)
    for more in ([], ["--overwrite"]):
        assert main(["convert", str(source), str(out), "--to", "fp8", *more]) == 5
        assert "another run is writing into this folder" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [JOURNAL_NAME]
    other.close()
    assert main(["convert", str(source), str(out), "--to", "fp8"]) == 0


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def swapped(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))  # the same bytes and time, another file
    path.with_suffix(".new").replace(path)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("change", [rewritten, swapped, truncated, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shard", [1, 2, 4])
def test_a_source_that_changes_while_it_is_read(tmp_path: Path, change: Callable[[Path], object], shard: int) -> None:
    """Changed at the first progress report; noticed at once or when its shard is done, and never called finished."""
    source, out = write_small(tmp_path / "source", mtp=True), tmp_path / "out"
    name = f"model-0000{shard}-of-00004.safetensors"
    changed = iter([source / name])

    def advance(_count: int, _shard: str) -> None:
        for path in changed:
            change(path)

    with pytest.raises(CheckpointError, match=name) as caught:
        convert(source, out, "fp8", progress=lambda _done: advance, workers=1)
    assert caught.value.hint
    assert not (out / name).exists()
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_existing_output(source: Path, expected: Path, tmp_path: Path, overwrite: bool) -> None:
    """Refused, or replaced without leftovers; files that are no part of a checkpoint stay."""
    out = tmp_path / "out"
    convert(source, out, "bf16")
    (out / "model-00009-of-00009.safetensors").write_bytes(b"old")
    (out / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    if not overwrite:
        with pytest.raises(OutputError, match="is not empty"):
            convert(source, out, "fp8")
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        return
    convert(source, out, "fp8", overwrite=True)
    (out / "notes.txt").unlink()
    assert_same_checkpoint(out, expected)


def test_a_file_where_the_folder_should_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "inside"):
        for overwrite in (False, True):
            with pytest.raises(OutputError):
                convert(source, out, "fp8", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"
