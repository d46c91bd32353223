"""Processes that SIGKILL ends at any moment, before, in or after a system call or a request; the same command again.

The last test is the whole way of a checkpoint, with a kill in every step.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub.conftest import Chain
from tests.hub.server import TOKEN, TestHub, running
from tests.hub.test_push import assert_published, is_untouched
from tests.hub.test_stream import assert_converted, assert_staged
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.errors import CheckpointError

ROOT = Path(__file__).parents[2]
SOURCE, REPO = "me/source", "me/fp8"
POINTS = [3, pytest.param(20, marks=pytest.mark.slow)]


@dataclass
class Bench:
    """A Hub, and a program that runs command lines and is struck (tests/checkpoint/crash_server.py)."""

    hub: TestHub
    server: "subprocess.Popen[str]"
    errors: Path

    def run(self, *argv: str, moment: int = -1, number: int = signal.SIGKILL) -> tuple[int, int]:
        """Run a command line, struck at a moment; how it ended, and how many moments there were."""
        assert self.server.stdin and self.server.stdout
        job = {"argv": argv, "signal": number, "moment": moment, "stderr": str(self.errors), "network": True}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        assert "Traceback" not in self.errors.read_text()
        return answer["exit"], answer["moments"]

    def must_run(self, *argv: str) -> int:
        code, moments = self.run(*argv)
        assert code == 0, self.errors.read_text()
        return moments


@pytest.fixture(scope="module")
def bench(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("kills")
    with running(root / "store") as hub, (root / "server.stderr").open("w") as log:
        hub.store.add_folder(SOURCE, chain.source)
        environment = os.environ | {
            "HF_ENDPOINT": hub.url(),
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(root / "hf-home"),
            "HF_HUB_DISABLE_XET": "1",
        }
        warm_up = ["push", str(chain.fp8), REPO, "--parity", str(chain.report), "--dry-run"]
        program = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning"]
        program += ["-m", "tests.checkpoint.crash_server", *warm_up]
        with subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment
        ) as server:
            yield Bench(hub, server, root / "stderr")
            assert server.stdin
            server.stdin.close()


@dataclass(frozen=True)
class Case:
    """A run to strike: its Hub, its checkpoints, and the folder that it writes."""

    bench: Bench
    chain: Chain
    out: Path

    def command(self, name: str) -> list[str]:
        if name == "push":
            return ["push", str(self.chain.fp8), REPO, "--parity", str(self.chain.report)]
        if name == "download":
            return ["download", SOURCE, "--local-dir", str(self.out)]
        push = ["--push", REPO] if name == "convert --push" else []
        return ["convert", SOURCE, str(self.out), "--to", "fp8", *push]

    def assert_nothing_half(self) -> None:
        """A file with its real name is whole, a folder that opens as a checkpoint too, and main, if it is touched."""
        for path in self.out.glob("*") if self.out.exists() else []:
            if path.suffix in (".safetensors", ".json") and not path.name.startswith("v4quant"):
                wholes = [(folder / path.name).read_bytes() for folder in (self.chain.fp8, self.chain.source)]
                assert path.read_bytes() in wholes, f"{path.name} looks whole"
        if not (self.out / "config.json").exists():
            with pytest.raises(CheckpointError):
                open_checkpoint(self.out)
        if not is_untouched(self.bench.hub):
            names = set(open_checkpoint(self.chain.fp8).files.names())
            assert names < set(self.bench.hub.store.repos[REPO].main)

    def assert_complete(self, name: str) -> None:
        """What the command is for is done."""
        if name == "push":
            assert_published(self.bench.hub, self.chain.fp8)
        elif name == "convert":
            assert_converted(self.out, self.chain)
        elif name == "convert --push":
            assert_staged(self.bench.hub, self.out, self.chain)
        else:
            assert open_checkpoint(self.out).source_id() == open_checkpoint(self.chain.source).source_id()
            for path in self.chain.source.rglob("*.*"):
                assert (self.out / path.relative_to(self.chain.source)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("name", ["download", "convert", "convert --push", "push"])
def test_killed_at_any_moment_and_run_again(bench: Bench, chain: Chain, tmp_path: Path, name: str, points: int) -> None:
    bench.hub.store.repos.pop(REPO, None)
    counted = Case(bench, chain, tmp_path / "counted")
    moments = bench.must_run(*counted.command(name))
    counted.assert_complete(name)
    struck = 0
    for point in range(points):
        case = Case(bench, chain, tmp_path / f"out{point}")
        bench.hub.store.repos.pop(REPO, None)
        moment = int((point + random.Random(f"{name} {point} of {points}").random()) * moments / points)
        code, _ = bench.run(*case.command(name), moment=moment)
        assert code in (-signal.SIGKILL, 0), bench.errors.read_text()
        struck += code != 0
        case.assert_nothing_half()
        if not (name.startswith("convert") and is_complete(case.out)):
            bench.must_run(*case.command(name))
        case.assert_complete(name)
    assert struck >= points - 2


@pytest.mark.parametrize("name", ["download", "convert --push", "push"])
def test_interrupted(bench: Bench, chain: Chain, tmp_path: Path, name: str) -> None:
    """Ctrl-C ends a run at once, whatever it waits for, and the same command goes on."""
    for number, moment in enumerate((20, 50)):
        case = Case(bench, chain, tmp_path / f"out{number}")
        bench.hub.store.repos.pop(REPO, None)
        code, _ = bench.run(*case.command(name), moment=moment, number=signal.SIGINT)
        assert code == 130, bench.errors.read_text()
        assert bench.errors.read_text().startswith("error: interrupted")
        case.assert_nothing_half()
        bench.must_run(*case.command(name))
        case.assert_complete(name)


def is_complete(out: Path) -> bool:
    """True if a conversion was killed after its last step; it then refuses to be made again."""
    return (out / "config.json").exists() and not (out / "v4quant.journal.jsonl").exists()


def test_a_run_that_is_killed_again_and_again_sends_nothing_twice(bench: Bench, chain: Chain, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = Case(bench, chain, out).command("convert --push")
    bench.hub.store.repos.pop(REPO, None)
    bench.hub.forget()
    code = -signal.SIGKILL
    for moment in range(60, 3_000, 120):
        code, _ = bench.run(*command, moment=moment)
        if code == 0 or is_complete(out):
            break
    assert moment > 100
    assert_staged(bench.hub, out, chain)
    # A kill in the middle of a request may repeat it, and no more.
    sent = [request.path for request in bench.hub.asked("/upload/", "PUT")]
    assert len(sent) <= len(set(sent)) + 2


class _Way:
    """The commands of a checkpoint's way to the Hub and back, each struck once at random and run again."""

    def __init__(self, bench: Bench, seed: int, spread: int) -> None:
        self._bench = bench
        self._random = random.Random(seed)
        self._spread = spread
        self.struck = 0

    def step(self, *argv: str, again: tuple[str, ...] | None = None, done: Path | None = None) -> None:
        code, _ = self._bench.run(*argv, moment=self._random.randrange(self._spread))
        assert code in (-signal.SIGKILL, 0), self._bench.errors.read_text()
        self.struck += code != 0
        if code != 0 and not (done is not None and is_complete(done)):
            self._bench.must_run(*(again or argv))


def whole_way(bench: Bench, root: Path, synth: list[str], spread: int) -> None:
    """synth, push source, inspect, convert and push, parity, push, download, verify; a kill in each."""
    hub, way = bench.hub, _Way(bench, 11, spread)
    source, out, report, back = (root / name for name in ("source", "out", "report", "back"))
    repo, fp8 = "me/way", "me/way-fp8"
    way.step("synth", str(source), *synth, again=("synth", str(source), *synth, "--overwrite"))
    way.step("push", str(source), repo, "--force-unverified")
    shutil.rmtree(source)
    commit = hub.store.repos[repo].refs["refs/heads/main"]
    pinned = f"hf://{repo}@{commit}"
    total = sum(blob.size for blob in hub.store.repos[repo].main.values())
    hub.forget()
    way.step("inspect", repo)
    assert hub.sent() < max(total // 100, 200_000)
    way.step("convert", repo, str(out), "--to", "fp8", "--push", fp8, done=out)
    assert not list(out.rglob("*.safetensors"))
    (branch,) = [ref for ref in hub.store.repos[fp8].refs if "v4quant-" in ref]
    staged = f"hf://{fp8}@{branch.removeprefix('refs/heads/')}"
    parity = ("parity", staged, "--against", pinned, "--report", str(report), "--overwrite")
    way.step(*parity)
    way.step("push", str(out), fp8, "--parity", str(report / "parity.json"))
    way.step("download", fp8, "--local-dir", str(back))
    assert [ref for ref in hub.store.repos[fp8].refs if "v4quant-" in ref] == []
    way.step("verify", str(back))
    way.step("verify", fp8, "--against", pinned)
    assert way.struck >= 5


def test_the_whole_way_of_a_tiny_checkpoint(bench: Bench, tmp_path: Path) -> None:
    whole_way(bench, tmp_path, ["--like", "flash", "--tiny", "--layers", "3"], spread=90)


@pytest.mark.slow
def test_the_whole_way_of_full_size_layers(bench: Bench, tmp_path: Path) -> None:
    """Real layer shapes and fewer experts: takes 10 GB of disk, the Hub's own included."""
    bench.hub.multipart_bytes = 64 * 2**20
    whole_way(bench, tmp_path, ["--like", "flash", "--layers", "1", "--experts", "32"], spread=250)
