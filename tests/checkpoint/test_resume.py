"""A conversion that was killed or interrupted at any moment continues to the very bytes of an undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.conversion import write_small
from tests.checkpoint.journals import finished
from v4quant.checkpoint.reader import JOURNAL_NAME, open_checkpoint
from v4quant.cli.main import main
from v4quant.errors import CheckpointError
from v4quant.testing.asserts import assert_same_checkpoint

ROOT = Path(__file__).parents[2]
POINTS = 25


@dataclass(frozen=True)
class Outcome:
    """How a struck run ended.

    Attributes:
        exit: exit code; negative for the signal that ended the process.
        moments: moments at which it could have been struck.
        errors: what it said on stderr.
    """

    exit: int
    moments: int
    errors: str


@dataclass(frozen=True)
class Bench:
    """A checkpoint to convert, the undisturbed result, and the program that disturbs (crash_server.py)."""

    source: Path
    expected: Path
    server: "subprocess.Popen[str]"
    moments: int

    def command(self, out: Path) -> list[str]:
        return ["convert", str(self.source), str(out), "--to", "fp8"]

    def strike(self, out: Path, signal_number: int, moment: int) -> Outcome:
        return strike(self.server, self.command(out), signal_number, moment, out.with_suffix(".stderr"))


def strike(server: "subprocess.Popen[str]", argv: list[str], number: int, moment: int, stderr: Path) -> Outcome:
    assert server.stdin and server.stdout
    job = {"argv": argv, "signal": number, "moment": moment, "stderr": str(stderr)}
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    answer: dict[str, Any] = json.loads(server.stdout.readline())
    return Outcome(answer["exit"], answer["moments"], stderr.read_text())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("bench")
    source = write_small(root / "source", mtp=True)
    (source / "encoding").mkdir()
    (source / "encoding" / "encoding.py").write_text("# carried along\n")
    expected, errors = root / "expected", root / "stderr"
    undisturbed = ["convert", str(source), str(expected), "--to", "fp8"]
    program = [sys.executable, "-m", "tests.checkpoint.crash_server", *undisturbed]
    with (
        errors.open("w") as log,
        subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT
        ) as server,
    ):
        bench = Bench(source, expected, server, moments=0)
        outcome = bench.strike(root / "counted", signal.SIGKILL, -1)
        assert outcome.exit == 0, outcome.errors
        yield replace(bench, moments=outcome.moments)
        assert server.stdin
        server.stdin.close()


@pytest.fixture(scope="module")
def half(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A killed run that has finished two or three of its four shards."""
    out = tmp_path_factory.mktemp("half") / "out"
    strike_until_half_done(bench, out)
    return out


def strike_until_half_done(bench: Bench, out: Path) -> None:
    for moment in range(bench.moments // 2, bench.moments, 5):
        bench.strike(out, signal.SIGKILL, moment)
        if len(finished(out)) in (2, 3):
            return
    raise AssertionError("no such moment")


def assert_nothing_false_looks_whole(out: Path, expected: Path) -> None:
    """A file with its real name is whole; a folder that opens as a checkpoint is whole."""
    for path in out.rglob("*") if out.exists() else []:
        relative = path.relative_to(out)
        if path.is_file() and path.suffix != ".partial" and path.name != JOURNAL_NAME:
            assert path.read_bytes() == (expected / relative).read_bytes(), f"{relative} looks whole"
    if (out / "config.json").exists():
        missing = {p.relative_to(expected) for p in expected.rglob("*")} - {p.relative_to(out) for p in out.rglob("*")}
        assert not missing
    else:
        with pytest.raises(CheckpointError):
            open_checkpoint(out)


def run_again(bench: Bench, out: Path) -> None:
    """The same command: it ends well, leaves the finished shards alone, and the result is the undisturbed one."""
    done = finished(out)
    complete = (out / "config.json").exists() and not (out / JOURNAL_NAME).exists()
    assert main(bench.command(out)) == (5 if complete else 0)
    assert_same_checkpoint(out, bench.expected)
    for name, seen in done.items():
        assert [(out / name).stat().st_ino, (out / name).stat().st_mtime_ns] == seen, f"{name} was written again"


def chosen(bench: Bench, purpose: str, number: int, points: int) -> int:
    """A random moment of the run, each point from its own part of it, so that all of it is covered."""
    return int((number + random.Random(f"{purpose} {number}").random()) * bench.moments / points)


@pytest.mark.parametrize("number", range(POINTS))
def test_killed_at_any_moment(bench: Bench, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    outcome = bench.strike(out, signal.SIGKILL, chosen(bench, "kill", number, POINTS))
    # Threads may pass a few moments less than the undisturbed run did; a run that then ends by itself is whole.
    assert outcome.exit == -signal.SIGKILL or (number == POINTS - 1 and outcome.exit == 0)
    assert_nothing_false_looks_whole(out, bench.expected)
    run_again(bench, out)


def test_killed_again_and_again(bench: Bench, tmp_path: Path) -> None:
    """Every run gets a little further; in the end there is the same checkpoint."""
    out, last, moment = tmp_path / "out", 0, 0
    for moment in range(60, 1_500, 60):
        outcome = bench.strike(out, signal.SIGKILL, moment)
        assert_nothing_false_looks_whole(out, bench.expected)
        assert len(finished(out)) >= last or outcome.exit == 0
        last = len(finished(out))
        if outcome.exit == 0:
            break
        assert outcome.exit == -signal.SIGKILL
    assert moment > 120
    assert_same_checkpoint(out, bench.expected)


INTERRUPTS = 20


@pytest.mark.parametrize("number", range(INTERRUPTS))
def test_interrupted_at_any_moment(bench: Bench, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    outcome = bench.strike(out, signal.SIGINT, chosen(bench, "interrupt", number, INTERRUPTS))
    assert outcome.exit == 130 or (number == INTERRUPTS - 1 and outcome.exit == 0), outcome.errors
    if outcome.exit == 130:
        assert outcome.errors.startswith("error: interrupted")
        assert "Traceback" not in outcome.errors
        assert not list(out.rglob("*.partial"))
    if "finished and kept" in outcome.errors:
        assert f"interrupted: {len(finished(out))} of 4 shards are finished and kept" in outcome.errors
        assert outcome.errors.endswith("hint: Run the same command again to continue.\n")
    assert_nothing_false_looks_whole(out, bench.expected)
    run_again(bench, out)


@pytest.mark.parametrize("lost", range(1, 2_000, 250))
def test_a_torn_journal_costs_no_more_than_its_last_shard(bench: Bench, half: Path, tmp_path: Path, lost: int) -> None:
    """After a power cut the last lines may be missing or torn."""
    out = shutil.copytree(half, tmp_path / "out")
    journal = out / JOURNAL_NAME
    os.truncate(journal, max(0, journal.stat().st_size - lost))
    run_again(bench, out)


def test_a_finished_shard_that_is_gone_or_cut_is_made_again(bench: Bench, half: Path, tmp_path: Path) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    first, second = sorted(finished(out))[:2]
    (out / first).unlink()
    os.truncate(out / second, 100)
    assert main(bench.command(out)) == 0
    assert_same_checkpoint(out, bench.expected)


@pytest.mark.parametrize("delay", [0.01, 0.05, 0.15])
def test_the_command_itself_killed_from_outside(bench: Bench, tmp_path: Path, delay: float) -> None:
    """A process of its own, killed some time after it began to write; whatever it reached, the same command ends it."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "v4quant", *bench.command(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not (out / JOURNAL_NAME).exists() and process.poll() is None:
                pass
            process.wait(delay)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
    assert_nothing_false_looks_whole(out, bench.expected)
    run_again(bench, out)


def touch(source: Path) -> None:
    os.utime(source / "model-00002-of-00004.safetensors", ns=(1, 1))


def replace_config(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))


@pytest.mark.parametrize(("change", "named"), [(touch, "model-00002-of-00004"), (replace_config, "config.json")])
def test_a_source_that_changed_between_the_runs(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], named: str
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(bench.source, source)
    own = Bench(source, bench.expected, bench.server, bench.moments)
    strike_until_half_done(own, out)
    before = finished(out)
    change(source)
    assert main(own.command(out)) == 3
    errors = capsys.readouterr().err
    assert "its source has changed since it began" in errors
    assert named in errors
    assert finished(out) == before
    assert main([*own.command(out), "--overwrite"]) == 0
    assert open_checkpoint(out).problems == []
    assert finished(out) == {}


@pytest.mark.parametrize("options", [["--to", "bf16"], ["--max-shard-size", "300KB"]])
def test_other_options_need_overwrite(
    bench: Bench, half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    out = shutil.copytree(half, tmp_path / "out")
    before = finished(out)
    assert main([*bench.command(out), *options]) == 5
    assert "unfinished run with other options" in capsys.readouterr().err
    assert finished(out) == before
    assert main([*bench.command(out), *options, "--overwrite"]) == 0
    assert main(["convert", str(bench.source), str(tmp_path / "direct"), "--to", "fp8", *options]) == 0
    assert_same_checkpoint(out, tmp_path / "direct")
