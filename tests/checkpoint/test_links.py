"""Re-packing: what does not change is linked, proved all the same, and no run mistakes a new link for a new source."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.conversion import convert, plan_of, stored, write_small
from v4quant.checkpoint import linked_files
from v4quant.checkpoint.apply import apply
from v4quant.checkpoint.certificate import CERTIFICATE_NAME, Verdict
from v4quant.checkpoint.file_stamp import is_same_fingerprint
from v4quant.checkpoint.files import Files
from v4quant.checkpoint.journal import lock_journal
from v4quant.checkpoint.journal_keeper import JournalKeeper
from v4quant.checkpoint.layout import Packing
from v4quant.checkpoint.output import ShardFile, write_file
from v4quant.checkpoint.reader import JOURNAL_NAME, open_checkpoint
from v4quant.checkpoint.verify import verify_against
from v4quant.cli.main import main
from v4quant.errors import CheckpointError, OutputError
from v4quant.testing.asserts import assert_bitwise_equal, assert_same_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_small(tmp_path / "source", mtp=True)


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def are_linked(out: Path, source: Path) -> list[bool]:
    return [any(path.samefile(other) for other in weights(source)) for path in weights(out)]


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


def assert_holds_the_same(out: Path, source: Path) -> None:
    checkpoint = open_checkpoint(out)
    assert checkpoint.problems == []
    ours, theirs = stored(out), stored(source)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert_bitwise_equal(ours[name], array)
    report = verify_against(checkpoint, open_checkpoint(source))
    assert report.ok
    assert report.verdicts.keys() == {Verdict.BIT_IDENTICAL}


def test_unchanged_files_are_linked_and_a_copy_is_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = convert(source, tmp_path / "linked", "native")
    assert report.linked_files == len(weights(source)) == 4
    assert are_linked(tmp_path / "linked", source) == [True] * 4
    assert_holds_the_same(tmp_path / "linked", source)
    refuse_links(monkeypatch)
    assert convert(source, tmp_path / "copied", "native").linked_files == 0
    assert are_linked(tmp_path / "copied", source) == [False] * 4
    assert_same_checkpoint(tmp_path / "copied", tmp_path / "linked")


@pytest.mark.parametrize("packing", [Packing.FULL, Packing.ONE])
def test_there_and_back_again(source: Path, tmp_path: Path, packing: Packing) -> None:
    """Packed anew nothing is linked; the layers packed again are the released files, byte for byte."""
    packed, back = tmp_path / "packed", tmp_path / "back"
    report = apply(plan_of(source, "native", packing=packing, max_shard_bytes=1_000_000), packed)
    assert report.linked_files == 0
    assert_holds_the_same(packed, source)
    if packing is Packing.ONE:
        assert [path.name for path in weights(packed)] == ["model.safetensors"]
    convert(packed, back, "native")
    (back / CERTIFICATE_NAME).unlink()
    assert_same_checkpoint(back, source)


def test_files_that_are_split_are_copied_and_the_others_linked(source: Path, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in weights(source))
    report = apply(plan_of(source, "native", max_shard_bytes=largest // 2), tmp_path / "out")
    assert 0 < report.linked_files < len(weights(tmp_path / "out"))
    assert sum(are_linked(tmp_path / "out", source)) == report.linked_files
    assert_holds_the_same(tmp_path / "out", source)


def test_a_file_of_another_header_is_linked_as_it_is(source: Path, tmp_path: Path) -> None:
    """As other tools write them: tensors in another order, with metadata."""
    import safetensors.torch

    from tests.checkpoint.conversion import stored_torch

    path = weights(source)[0]
    tensors = {name: tensor for name, tensor in stored_torch(source).items() if name == "embed.weight"}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    report = convert(source, tmp_path / "out", "native")
    assert report.linked_files == 4
    assert_holds_the_same(tmp_path / "out", source)


def test_only_repacking_links(source: Path, tmp_path: Path) -> None:
    """The embedding's file does not change either, but a converted checkpoint is nobody else's."""
    assert convert(source, tmp_path / "fp8", "fp8").linked_files == 0
    assert are_linked(tmp_path / "fp8", source) == [False] * 4


def test_blobs_of_the_hub_cache_are_linked_not_their_links(source: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    shutil.copytree(source, snapshot)
    for number, path in enumerate(weights(snapshot)):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    assert convert(snapshot, tmp_path / "out", "native").linked_files == 4
    for number, path in enumerate(weights(tmp_path / "out")):
        assert not path.is_symlink()
        assert path.samefile(blobs / str(number))
    shutil.rmtree(tmp_path / "repo")
    assert_holds_the_same(tmp_path / "out", source)


def test_another_file_system_is_copied_to(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Files, "device", lambda _self, _name: -1)
    plan = plan_of(source, "native")
    assert linked_files.linkable(plan.source.files, tmp_path, plan.unchanged_files) == {}
    assert apply(plan, tmp_path / "out").linked_files == 0
    assert_same_checkpoint(tmp_path / "out", convert_elsewhere(source, tmp_path))


def convert_elsewhere(source: Path, tmp_path: Path) -> Path:
    own = shutil.copytree(source, tmp_path / "elsewhere" / "source")
    convert(own, tmp_path / "elsewhere" / "out", "native")
    return tmp_path / "elsewhere" / "out"


def test_where_links_turn_out_impossible_the_disk_must_hold_copies(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_links(monkeypatch)
    monkeypatch.setattr("v4quant.checkpoint.output.free_bytes", lambda _folder: 100_000)
    with pytest.raises(OutputError, match=r"bytes, 100,000 are free"):
        convert(source, tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


def test_dry_run_and_report_count_links(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*options: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["convert", str(source), str(tmp_path / "out"), "--to", "native", "--json", *options]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    one = run("--dry-run", "--pack", "one")
    planned = run("--dry-run")
    payload = sum(path.stat().st_size for path in weights(source))
    assert (one["linked_files"], one["shards"], planned["linked_files"]) == (0, 1, 4)
    assert one["disk_bytes"] > payload > 5 * planned["disk_bytes"]
    assert run()["linked_files"] == 4
    own = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.stat().st_nlink == 1]
    assert planned["disk_bytes"] * 0.7 < sum(path.stat().st_size for path in own) < planned["disk_bytes"] * 1.1
    shutil.rmtree(tmp_path / "out")
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "native"]) == 0
    assert "4 files unchanged, hard links to the source" in capsys.readouterr().out


def test_unknown_packings_are_answered_with_the_known(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "native", "--pack", "two"]) == 2
    errors = capsys.readouterr().err
    assert all(f"'{packing}'" in errors for packing in Packing)


def strike(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A run that ends with an error after so many shards."""
    noted: list[str] = []

    def note(self: JournalKeeper, shard: str, records: Any) -> None:
        if len(noted) == after:
            raise OutputError("the disk is full")
        noted.append(shard)
        original(self, shard, records)

    original = JournalKeeper.note
    with monkeypatch.context() as patch:
        patch.setattr(JournalKeeper, "note", note)
        with pytest.raises(OutputError):
            convert(source, out, "native", workers=1)


def test_an_interrupted_run_continues_though_links_changed_the_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    strike(source, out, monkeypatch, after=2)
    journal = (out / JOURNAL_NAME).read_text()
    assert journal.count('{"finished"') == 2
    report = convert(source, out, "native")
    assert (report.resumed_shards, report.linked_files) == (2, 4)
    assert_holds_the_same(out, source)


def test_a_run_that_finished_nothing_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [path.read_bytes() for path in weights(source)]
    strike(source, tmp_path / "out", monkeypatch, after=0)
    assert not (tmp_path / "out").exists()
    assert [path.read_bytes() for path in weights(source)] == before
    assert {path.stat().st_nlink for path in weights(source)} == {1}


def test_other_runs_of_the_same_source_go_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is reading now, and one that was interrupted before."""
    reading = plan_of(source, "bf16")
    reading.source.files.read(weights(source)[0].name, 0, 8)
    interrupted = tmp_path / "interrupted"
    strike(source, interrupted, monkeypatch, after=1)
    convert(source, tmp_path / "linked", "native")
    apply(reading, tmp_path / "bf16")
    assert convert(source, interrupted, "native").resumed_shards == 1


def test_a_changed_source_is_still_noticed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strike(source, tmp_path / "out", monkeypatch, after=1)
    os.utime(weights(source)[1], ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"has changed since it began: model-00002-of-00004"):
        convert(source, tmp_path / "out", "native")


def test_overwriting_a_linked_checkpoint_leaves_its_source_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, "native")
    before = {path.name: path.read_bytes() for path in weights(source)}
    convert(source, out, "bf16", overwrite=True)
    assert {path.name: path.read_bytes() for path in weights(source)} == before
    assert are_linked(out, source) == [False] * 4


def test_overwriting_links_frees_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    convert(source, out, "native")
    plan = plan_of(source, "bf16")
    free = plan.disk_bytes - sum(path.stat().st_size for path in weights(source)) // 2
    monkeypatch.setattr("v4quant.checkpoint.output.free_bytes", lambda _folder: free)
    with pytest.raises(OutputError, match=rf"bytes, {free:,} are free"):
        apply(plan, out, overwrite=True)
    assert are_linked(out, source) == [True] * 4


def test_a_link_that_is_replaced_while_its_file_is_proved(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    original = linked_files.LinkedFile.finish

    def finish(self: linked_files.LinkedFile) -> None:
        self.path.unlink()
        self.path.write_bytes(b"other")
        original(self)

    monkeypatch.setattr(linked_files.LinkedFile, "finish", finish)
    with pytest.raises(OutputError, match="no longer the file that it was linked to"):
        convert(source, out, "native")
    assert not (out / "config.json").exists()


def test_a_link_of_another_name_does_not_stand_for_a_shard(source: Path, tmp_path: Path) -> None:
    """What lies under a shard's name of an unfinished run is a link to its own source file, or not there."""
    plan, out = plan_of(source, "native"), tmp_path / "out"
    out.mkdir()
    lock_journal(out).close()
    first, second = weights(source)[:2]
    os.link(second, out / first.name)
    assert apply(plan, out, overwrite=True).linked_files == 4
    assert_same_checkpoint_weights(out, source)


def assert_same_checkpoint_weights(out: Path, source: Path) -> None:
    assert [path.read_bytes() for path in weights(out)] == [path.read_bytes() for path in weights(source)]


def test_a_link_that_cannot_get_its_name_is_not_left(source: Path, tmp_path: Path) -> None:
    first = weights(source)[0]
    (tmp_path / first.name).mkdir()
    assert linked_files.make_links(Files(source), tmp_path, {first.name: first.name}) == {}
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("write", [lambda path: ShardFile(path, b"header", 100), lambda path: write_file(path, [b"x"])])
def test_a_link_that_a_killed_run_has_left_is_not_written_to(
    source: Path, tmp_path: Path, write: Callable[[Path], object]
) -> None:
    """It is another name of a source file."""
    first = weights(source)[0]
    before = first.read_bytes()
    (tmp_path / f"{first.name}.partial").hardlink_to(first)
    write(tmp_path / first.name)
    assert first.read_bytes() == before


def test_a_split_file_is_not_unchanged(source: Path) -> None:
    """Nor are the files that it is split into, though each holds tensors of that one file alone."""
    assert list(plan_of(source, "native").unchanged_files.values()) == [path.name for path in weights(source)]
    split = plan_of(source, "native", max_shard_bytes=100_000)
    assert len(split.shards) > 10 * len(split.unchanged_files)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("9 1 1 7 1", "9 1 1 7 1", True),
        ("9 1 1 7 1", "9 1 2 7 1", False),  # written to, and the time of the data set back
        ("9 1 1 7 1", "9 1 2 7 2", True),  # linked
        ("9 1 1 7 2", "9 1 2 7 1", True),  # a link removed
        ("9 1 1 7 1", "9 1 2 8 2", False),  # another file, which has a link
        ("9 1 1 7 1", "9 2 2 7 2", False),
        ("9 1 1 7 1", "8 1 1 7 1", False),
        ("9 1 1 7 1", "9 1 2 7 0", False),  # replaced
        ("etag", "etag", True),
        ("etag", "etag2", False),
        ("9 1", "9 1", True),
        ("", "9 1 1 7 1", False),
    ],
)
def test_fingerprints(first: str, second: str, same: bool) -> None:
    assert is_same_fingerprint(first, second) is same
    assert is_same_fingerprint(second, first) is same
