"""`shard` and `merge` killed or interrupted at any moment go on to the very bytes of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.checkpoint.sharding import shard, split, write_wide
from tests.checkpoint.test_resume import ROOT, Outcome, strike
from v4quant.checkpoint.reader import JOURNAL_NAME, SHARDS_NAME, open_checkpoint
from v4quant.checkpoint.sharding.folder import open_sharded
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.cli.main import main
from v4quant.errors import CheckpointError
from v4quant.testing.asserts import assert_same_checkpoint

POINTS = 12
ONLY_SHARD = pytest.mark.parametrize("bench", ["shard"], indirect=True)
ONLY_MERGE = pytest.mark.parametrize("bench", ["merge"], indirect=True)


@dataclass(frozen=True)
class Bench:
    """What a command reads, the undisturbed result, and the program that disturbs (crash_server.py).

    Attributes:
        command: the command line up to OUT, and what follows it.
        last: the file that is written last.
        keeps_partials: an unfinished run is continued in its partial files.
    """

    command: tuple[list[str], list[str]]
    expected: Path
    last: str
    keeps_partials: bool
    server: "subprocess.Popen[str]"
    moments: int = 0

    def argv(self, out: Path) -> list[str]:
        before, after = self.command
        return [*before, str(out), *after]

    def strike(self, out: Path, number: int, moment: int) -> Outcome:
        return strike(self.server, self.argv(out), number, moment, out.with_suffix(".stderr"))


@pytest.fixture(scope="module", params=["shard", "ranks", "merge"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("bench")
    source, sharded, expected = write_wide(root / "source"), root / "sharded", root / "expected"
    command: tuple[list[str], list[str]] = (["shard", str(source)], ["--tp", "2", "--experts", "fp8"])
    if request.param == "ranks":
        command = (["shard", str(source)], ["--tp", "2", "--ep", "2", "--pp", "2"])
    if request.param == "merge":
        shard(source, sharded, 2, fp8_experts=True)
        command = (["merge", str(sharded)], [])
    if request.param == "merge-ranks":
        split(source, sharded, Grid(2, 2))
        command = (["merge", str(sharded)], [])
    undisturbed = [*command[0], str(expected), *command[1]]
    program = [sys.executable, "-m", "tests.checkpoint.crash_server", *undisturbed]
    pipe = subprocess.PIPE
    with (
        (root / "stderr").open("w") as log,
        subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=log, text=True, cwd=ROOT) as server,
    ):
        is_merge = request.param.startswith("merge")
        bench = Bench(command, expected, "config.json" if is_merge else SHARDS_NAME, not is_merge, server)
        outcome = bench.strike(root / "counted", signal.SIGKILL, -1)
        assert outcome.exit == 0, outcome.errors
        assert_same_checkpoint(root / "counted", expected)
        yield replace(bench, moments=outcome.moments)
        assert server.stdin
        server.stdin.close()


def finished(out: Path) -> int:
    """How many files the journal calls finished."""
    journal = out / JOURNAL_NAME
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return sum(line.startswith(b'{"finished"') for line in lines)


def assert_nothing_false_looks_whole(bench: Bench, out: Path) -> None:
    """A file with its real name is whole; a folder that can be opened is whole."""
    for path in out.rglob("*") if out.exists() else []:
        relative = path.relative_to(out)
        if path.is_file() and path.suffix != ".partial" and path.name != JOURNAL_NAME:
            assert path.read_bytes() == (bench.expected / relative).read_bytes(), f"{relative} looks whole"
    if (out / bench.last).exists():
        missing = {p.relative_to(bench.expected) for p in bench.expected.rglob("*")}
        assert not missing - {p.relative_to(out) for p in out.rglob("*")}
    else:
        for opened in (open_checkpoint, open_sharded):
            with pytest.raises(CheckpointError):
                opened(out)


def run_again(bench: Bench, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command: it ends well, does no finished file again, and the result is the undisturbed one."""
    done = finished(out)
    complete = (out / bench.last).exists() and not (out / JOURNAL_NAME).exists()
    capsys.readouterr()
    assert main([*bench.argv(out), "--json"]) == (5 if complete else 0)
    if not complete:
        assert json.loads(capsys.readouterr().out)["resumed_files"] == done
    assert_same_checkpoint(out, bench.expected)


@pytest.mark.parametrize("number", range(POINTS))
def test_killed_at_any_moment(bench: Bench, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    outcome = bench.strike(out, signal.SIGKILL, int((number + 0.5) * bench.moments / POINTS))
    assert outcome.exit == -signal.SIGKILL or (number == POINTS - 1 and outcome.exit == 0)
    assert_nothing_false_looks_whole(bench, out)
    run_again(bench, out, capsys)


def test_killed_near_the_end(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While files get their names and the last ones are written."""
    struck = 0
    for back in range(3, 60, 9):
        out = tmp_path / str(back)
        struck += bench.strike(out, signal.SIGKILL, bench.moments - back).exit == -signal.SIGKILL
        assert_nothing_false_looks_whole(bench, out)
        run_again(bench, out, capsys)
    assert struck > 4


def test_killed_again_and_again(bench: Bench, tmp_path: Path) -> None:
    """Every run gets a little further; in the end there is the same result."""
    out, last, runs = tmp_path / "out", 0, 0
    for moment in range(100, bench.moments + 1_000, 100):
        outcome = bench.strike(out, signal.SIGKILL, moment)
        assert_nothing_false_looks_whole(bench, out)
        assert finished(out) >= last or outcome.exit == 0
        last, runs = finished(out), runs + 1
        if outcome.exit == 0:
            break
    assert runs > 2
    assert_same_checkpoint(out, bench.expected)


@pytest.mark.parametrize("number", range(6))
def test_interrupted_at_any_moment(
    bench: Bench, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    outcome = bench.strike(out, signal.SIGINT, int((number + 0.3) * bench.moments / 6))
    assert outcome.exit == 130 or (number == 5 and outcome.exit == 0), outcome.errors
    if outcome.exit == 130:
        assert outcome.errors.startswith("error: interrupted")
        assert "Traceback" not in outcome.errors
        if not (bench.keeps_partials and finished(out)):
            assert not list(out.rglob("*.partial"))
    if "and kept" in outcome.errors:
        assert f"interrupted: {finished(out)} of 6 files are" in outcome.errors
    assert_nothing_false_looks_whole(bench, out)
    run_again(bench, out, capsys)


def half_done(bench: Bench, out: Path) -> Path:
    """A killed run that has finished some files."""
    for moment in range(bench.moments // 2, bench.moments, bench.moments // 40):
        shutil.rmtree(out, ignore_errors=True)  # a run that went on with an earlier one might reach its end
        bench.strike(out, signal.SIGKILL, moment)
        if finished(out) > 2:
            return out
    raise AssertionError("no such moment")


@pytest.fixture(scope="module")
def half(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, to be copied."""
    return half_done(bench, tmp_path_factory.mktemp("half") / "out")


@pytest.mark.parametrize("lost", [1, 100, 400])
def test_a_torn_journal(
    bench: Bench, half: Path, tmp_path: Path, lost: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a power cut the last lines may be missing or torn: at most a few files are done again."""
    out = shutil.copytree(half, tmp_path / "out")
    before = finished(out)
    os.truncate(out / JOURNAL_NAME, (out / JOURNAL_NAME).stat().st_size - lost)
    assert 0 < finished(out) < before
    run_again(bench, out, capsys)


def test_a_torn_journal_of_a_run_whose_files_have_their_names(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for back in range(3, 100, 3):
        bench.strike(out, signal.SIGKILL, bench.moments - back)
        if (out / JOURNAL_NAME).exists() and not list(out.rglob("*.partial")):
            break
        shutil.rmtree(out)
    os.truncate(out / JOURNAL_NAME, (out / JOURNAL_NAME).stat().st_size - 10)
    assert finished(out) == 5
    run_again(bench, out, capsys)


def test_a_partial_file_that_is_gone_costs_what_went_into_it(bench: Bench, half: Path, tmp_path: Path) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    for path in sorted(out.rglob("*.partial"))[:1] if bench.keeps_partials else sorted(out.glob("model*"))[:1]:
        path.unlink()
    assert main(bench.argv(out)) == 0
    assert_same_checkpoint(out, bench.expected)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@ONLY_SHARD
@pytest.mark.parametrize(
    ("change", "name"), [(touch, "model-00002-of-00006.safetensors"), (append, "empty.txt"), (append, "config.json")]
)
def test_a_source_that_changed_between_the_runs(
    change: Callable[[Path], None], name: str, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(bench.command[0][1], tmp_path / "source")
    own = replace(bench, command=(["shard", str(source)], bench.command[1]))
    out = half_done(own, tmp_path / "out")
    change(source / name)
    before = finished(out)
    assert main(own.argv(out)) == 3
    errors = capsys.readouterr().err
    assert "its source has changed since it began" in errors or name == "config.json"
    assert finished(out) == before
    assert main([*own.argv(out), "--overwrite"]) == 0
    open_sharded(out)
    assert finished(out) == 0


@ONLY_MERGE
def test_shards_that_changed_between_the_runs(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sharded = shutil.copytree(bench.command[0][1], tmp_path / "sharded")
    own = replace(bench, command=(["merge", str(sharded)], []))
    out = half_done(own, tmp_path / "out")
    touch(sharded / "model1-mp2.safetensors")
    assert main(own.argv(out)) == 3
    assert "its source has changed since it began: model1-mp2.safetensors" in capsys.readouterr().err
    assert main([*own.argv(out), "--overwrite"]) == 0
    assert_same_checkpoint(out, bench.expected)


def test_killed_again_after_a_partial_file_was_lost(bench: Bench, half: Path, tmp_path: Path) -> None:
    """A file that is begun anew has its full size at once, but not the bytes that the journal called finished."""
    for moment in range(200, bench.moments, bench.moments // 3):
        out = shutil.copytree(half, tmp_path / str(moment))
        lost = sorted(out.rglob("rank*/*.partial")) or sorted(out.glob("model*"))
        lost[0].unlink()
        bench.strike(out, signal.SIGKILL, moment)
        complete = (out / bench.last).exists() and not (out / JOURNAL_NAME).exists()
        assert main(bench.argv(out)) == (5 if complete else 0)
        assert_same_checkpoint(out, bench.expected)


Change = Callable[[list[str]], list[str]]


def in_line(number: int, **changes: object) -> Change:
    """Change a journal's record; None removes a key."""

    def change(lines: list[str]) -> list[str]:
        entry = json.loads(lines[number])
        entry["record"] = {k: v for k, v in (entry["record"] | changes).items() if v is not None}
        return [*lines[:number], json.dumps(entry), *lines[number + 1 :]]

    return change


# Line 0 is the journal's header, line 1 the first file; its tensors follow in merges and of rank folders.
FILE_DAMAGE: dict[str, Change] = {
    "a file is missing": lambda lines: [lines[0], *lines[2:]],
    "another file": in_line(1, file="x.safetensors"),
    "another size": in_line(1, bytes=1),
}
TENSOR_DAMAGE: dict[str, Change] = {
    "a tensor is missing": lambda lines: [*lines[:2], *lines[3:]],
    "another tensor": in_line(2, tensor="x"),
    "a tensor that is a number": in_line(2, tensor=3),
    "another share": in_line(2, share=99),
    "a share that is text": in_line(2, share="0"),
    "no share": in_line(2, share=None),
    "a tensor twice": lambda lines: [*lines[:3], *lines[2:]],
}


def assert_damage_is_found(bench: Bench, out: Path, change: Change, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is left out in silence of what a journal was to say."""
    lines = (out / JOURNAL_NAME).read_text().splitlines()
    (out / JOURNAL_NAME).write_text("".join(line + "\n" for line in change(lines)))
    assert main(bench.argv(out)) == 5
    assert "The journal was edited or damaged" in capsys.readouterr().err
    assert not (out / bench.last).exists()


@pytest.mark.parametrize("bench", ["shard", "ranks"], indirect=True)
@pytest.mark.parametrize("damage", FILE_DAMAGE)
def test_a_journal_that_lost_a_file(
    bench: Bench, half: Path, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_damage_is_found(bench, shutil.copytree(half, tmp_path / "out"), FILE_DAMAGE[damage], capsys)


@pytest.mark.parametrize("bench", ["ranks", "merge-ranks"], indirect=True)
@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_a_journal_that_lost_a_tensor(
    bench: Bench, half: Path, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_damage_is_found(bench, shutil.copytree(half, tmp_path / "out"), TENSOR_DAMAGE[damage], capsys)
