"""Several processes convert and verify as one does: the same files, the same findings, one clear error, one exit code.

Most tests play the processes by threads; those at the end start them with torchrun.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoint.conversion import convert, edit, plan_of
from tests.checkpoint.journals import finished
from tests.checkpoint.process_groups import in_processes
from v4quant.checkpoint import journal_keeper, process_group
from v4quant.checkpoint.apply import ApplyReport, apply
from v4quant.checkpoint.certificate import CERTIFICATE_NAME, RoundingRefusedError
from v4quant.checkpoint.journal import Journal, lock_journal
from v4quant.checkpoint.layout import Packing
from v4quant.checkpoint.output import ShardFile
from v4quant.checkpoint.process_group import EndedElsewhereError, ProcessGroup
from v4quant.checkpoint.reader import JOURNAL_NAME, open_checkpoint
from v4quant.checkpoint.shares import share_files
from v4quant.checkpoint.verify import verify_against, verify_hashes, verify_values
from v4quant.checkpoint.verify_report import VerifyReport
from v4quant.cli.main import main
from v4quant.errors import CheckpointError, InterruptedRunError, OutputError
from v4quant.testing.asserts import assert_same_checkpoint
from v4quant.testing.releases import synth_config
from v4quant.testing.synth import write_checkpoint

ROOT = Path(__file__).parents[2]
EXPERT = "layers.2.ffn.experts.1.w2.weight"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "BEAT_SECONDS", 0.02)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven shards: embedding, four layers, norm and head, the MTP block."""
    folder = tmp_path_factory.mktemp("scale-out") / "native"
    write_checkpoint(folder, *synth_config("flash", tiny=True, layers=4, experts=2, mtp=True), 0)
    return folder


@pytest.fixture(scope="module")
def alone(native: Path) -> Callable[..., Path]:
    """What one process makes of it; each conversion is done once."""

    def get(target: str, packing: Packing = Packing.LAYER) -> Path:
        out = native.parent / f"{target} {packing}"
        if not out.exists():
            apply(plan_of(native, target, packing=packing), out)
        return out

    return get


@pytest.fixture
def own(native: Path, tmp_path: Path) -> Path:
    """A source to damage."""
    return shutil.copytree(native, tmp_path / "source")


def together(size: int, source: Path, out: Path, to: str, **options: Any) -> list[ApplyReport | Exception]:
    """Convert in so many processes; options are those of `apply`."""

    def work(group: ProcessGroup) -> ApplyReport:
        return apply(plan_of(source, to), out, group=group, workers=2, **options)

    return in_processes(size, work)


def shares(source: Path, to: str, size: int) -> list[list[str]]:
    """Which shards each process writes."""
    plan = plan_of(source, to)
    costs = {s.name: s.file_bytes + sum(o.bytes_read for o in plan.operations[s.name]) for s in plan.shards}
    return share_files(costs, size)


def assert_only_whole_files(out: Path, expected: Path) -> None:
    """Nothing half-written is left, and what has a name is what one process would have written."""
    for path in out.iterdir():
        assert path.name == JOURNAL_NAME or path.read_bytes() == (expected / path.name).read_bytes()
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(("size", "target"), [(2, "fp8"), (3, "fp8"), (2, "bf16"), (3, "bf16"), (9, "fp8")])
def test_the_same_files(native: Path, alone: Callable[..., Path], tmp_path: Path, size: int, target: str) -> None:
    """With nine processes, two have no shard."""
    reports = together(size, native, tmp_path / "out", target)
    assert_same_checkpoint(tmp_path / "out", alone(target))
    assert [report == reports[0] for report in reports] == [True] * size
    assert isinstance(reports[0], ApplyReport)
    assert (reports[0].resumed_shards, reports[0].linked_files) == (0, 0)


@pytest.mark.parametrize("packing", [Packing.FULL, Packing.ONE, Packing.LAYER])
def test_packed_and_linked_together(native: Path, alone: Callable[..., Path], tmp_path: Path, packing: Packing) -> None:
    def work(group: ProcessGroup) -> int:
        return apply(plan_of(native, "native", packing=packing), tmp_path / "out", group=group).linked_files

    links = 7 if packing is Packing.LAYER else 0
    assert in_processes(2, work) == [links] * 2
    assert_same_checkpoint(tmp_path / "out", alone("native", packing))


def test_every_process_writes(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    original = ProcessGroup.send

    def send(self: ProcessGroup, topic: str, value: Any) -> None:
        sent.append(topic)
        original(self, topic, value)

    monkeypatch.setattr(ProcessGroup, "send", send)
    together(3, native, tmp_path / "out", "fp8")
    written = shares(native, "fp8", 3)
    assert min(map(len, written)) >= 2
    assert sorted(topic for topic in sent if topic.startswith("shard/")) == sorted(
        f"shard/{name}" for share in written[1:] for name in share
    )


def test_a_process_of_an_earlier_attempt_cannot_touch_what_a_later_one_writes(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that was cut off it may still write for a while: to partial files of its own."""
    partial: set[tuple[str, str]] = set()
    original = ShardFile.__init__

    def begin(self: ShardFile, path: Path, header: bytes, file_bytes: int, own: Path | None = None) -> None:
        assert own is not None
        partial.add((path.name, own.name))
        original(self, path, header, file_bytes, own)

    monkeypatch.setattr(ShardFile, "__init__", begin)
    for attempt in range(2):
        together(2, native, tmp_path / str(attempt), "fp8")
    assert len({shard for shard, _ in partial}) == 7
    assert len({own for _, own in partial}) == 14


def test_the_first_process_shows_everybodys_progress(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_group, "BEAT_SECONDS", 0.001)
    counted: list[Counter[str]] = [Counter() for _ in range(2)]

    def work(group: ProcessGroup) -> None:
        def begin(done: int) -> Callable[[int, str], None]:
            assert done == 0
            return lambda count, shard: counted[group.rank].update({shard: count})

        apply(plan_of(native, "fp8"), tmp_path / "out", group=group, progress=begin)

    assert in_processes(2, work) == [None] * 2
    assert counted[1] == {}
    own = shares(native, "fp8", 2)[0]
    assert counted[0].keys() - {"other processes"} == set(own)


def fails_at(monkeypatch: pytest.MonkeyPatch, shard: str, error: BaseException) -> None:
    """Make the end of writing a shard fail."""
    original = ShardFile.finish

    def finish(self: ShardFile) -> None:
        if self.path.name == shard:
            raise error
        original(self)

    monkeypatch.setattr(ShardFile, "finish", finish)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_disk_that_is_full_for_one_ends_all(
    native: Path, alone: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    out, shard = tmp_path / "out", shares(native, "fp8", 3)[rank][-1]
    with monkeypatch.context() as patch:
        fails_at(patch, shard, OutputError(f"{shard}: No space left on device"))
        results = together(3, native, out, "fp8")
    assert [type(result) for result in results].count(OutputError) == 1
    assert isinstance(results[rank], OutputError)
    assert {getattr(result, "exit_code", None) for result in results} == {5}
    assert_only_whole_files(out, alone("fp8"))
    # Any number of processes continue it, and what was finished stays.
    before = finished(out)
    assert len(before) >= 1
    reports = together(rank + 1, native, out, "fp8")
    assert [getattr(report, "resumed_shards", report) for report in reports] == [len(before)] * (rank + 1)
    assert_same_checkpoint(out, alone("fp8"))
    for name, (inode, changed) in before.items():
        assert [(out / name).stat().st_ino, (out / name).stat().st_mtime_ns] == [inode, changed]


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_in_one_ends_all(
    native: Path, alone: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fails_at(patch, shares(native, "fp8", 2)[rank][-1], KeyboardInterrupt())
        results = together(2, native, out, "fp8")
    assert isinstance(results[rank], InterruptedRunError)
    assert isinstance(results[1 - rank], EndedElsewhereError)
    assert getattr(results[1 - rank], "exit_code", None) == 130
    kept = "what was written is" if rank else f"{len(finished(out))} of 7 shards are"
    assert str(results[rank]) == f"interrupted: {kept} finished and kept"
    assert_only_whole_files(out, alone("fp8"))


def test_a_weight_that_is_not_finite_is_named_once(own: Path, tmp_path: Path) -> None:
    edit(own, EXPERT.replace("weight", "scale"), lambda rows: rows.__setitem__((3, 1), 255))
    results = together(3, own, tmp_path / "out", "fp8")
    spoken = [result for result in results if isinstance(result, CheckpointError)]
    assert len(spoken) == 1
    assert f"{EXPERT.replace('weight', 'scale')}[3, 1] is NaN" in str(spoken[0])
    assert {getattr(result, "exit_code", None) for result in results} == {3}


def test_rounding_that_one_finds_is_refused_by_all(alone: Callable[..., Path], tmp_path: Path) -> None:
    bf16 = shutil.copytree(alone("bf16"), tmp_path / "bf16")
    edit(bf16, EXPERT, lambda rows: rows.view(np.uint16).__ixor__(3))
    results = together(2, bf16, tmp_path / "out", "native")
    assert [type(result) for result in results].count(RoundingRefusedError) == 1
    assert {getattr(result, "exit_code", None) for result in results} == {1}
    assert not (tmp_path / "out" / "config.json").exists()
    allowed = together(2, bf16, tmp_path / "out", "native", allow_rounding=True)
    assert [[record.tensor for record in getattr(report, "worst", [])] for report in allowed] == [[EXPERT]] * 2
    convert(bf16, tmp_path / "one", "native", allow_rounding=True)
    assert_same_checkpoint(tmp_path / "out", tmp_path / "one")


def test_a_journal_that_cannot_be_written_ends_all(
    native: Path, alone: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process notices in the thread that notes the other's shards."""
    others, original = shares(native, "fp8", 2)[1], Journal.append

    def append(self: Journal, shard: str, records: Any) -> None:
        if shard in others:
            raise OutputError("the journal's disk is full")
        original(self, shard, records)

    monkeypatch.setattr(Journal, "append", append)
    first, second = together(2, native, tmp_path / "out", "fp8")
    assert isinstance(first, OutputError)
    assert str(first) == "the journal's disk is full"
    assert isinstance(second, EndedElsewhereError)
    assert_only_whole_files(tmp_path / "out", alone("fp8"))


def test_a_first_process_that_fails_does_not_wait_for_the_others_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_keeper, "_COLLECT_SECONDS", 0.001)
    asked: list[str] = []

    class Group(ProcessGroup):
        def receive(self, topic: str) -> Any:
            asked.append(topic)
            return None if len(asked) < 1000 else []

    journal = lock_journal(tmp_path)
    keeper = journal_keeper.JournalKeeper(journal, Group(), [["own"], ["shard of another"]])
    with pytest.raises(OutputError, match="disk full"), keeper.collecting(threading.Event()):
        raise OutputError("disk full")
    journal.close()
    assert len(asked) < 1000


def test_a_process_that_reads_another_source(native: Path, own: Path, tmp_path: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))

    def work(group: ProcessGroup) -> ApplyReport:
        return apply(plan_of(native if group.is_first else own, "fp8"), tmp_path / "out", group=group)

    first, second = in_processes(2, work)
    assert isinstance(first, EndedElsewhereError)
    assert isinstance(second, CheckpointError)
    assert "process 1 on" in str(second)
    assert "reads another checkpoint there than process 0" in str(second)
    assert not (tmp_path / "out").exists()


def test_a_process_that_sees_an_older_version_of_the_source(native: Path, own: Path, tmp_path: Path) -> None:
    """Sizes and headers are the same, as where a machine's cache is behind."""
    edit(own, EXPERT, lambda rows: rows[:1].__ixor__(1))

    def work(group: ProcessGroup) -> ApplyReport:
        return apply(plan_of(native if group.is_first else own, "fp8"), tmp_path / "out", group=group)

    first, second = in_processes(2, work)
    assert isinstance(first, EndedElsewhereError)
    assert isinstance(second, CheckpointError)
    assert "process 1 on" in str(second)
    assert "sees another version of model-00004-of-00007.safetensors there than process 0" in str(second)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_shared(native: Path, tmp_path: Path) -> None:
    """Even where an earlier run of the same plan has left a journal in it."""
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    lock_journal(there).close()

    def work(group: ProcessGroup) -> ApplyReport:
        return apply(plan_of(native, "fp8"), here if group.is_first else there, group=group)

    first, second = in_processes(2, work)
    assert isinstance(first, EndedElsewhereError)
    assert isinstance(second, OutputError)
    assert "is another folder for process 1 on" in str(second)
    assert not here.exists()
    assert [path.name for path in there.iterdir()] == [JOURNAL_NAME]


def test_a_source_that_changes_meanwhile(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = shares(own, "fp8", 2)[1][-1]
    original = ShardFile.__init__

    def begin(self: ShardFile, path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == shard:
            os.utime(own / path.name, ns=(1, 1))
        original(self, path, *args, **kwargs)

    monkeypatch.setattr(ShardFile, "__init__", begin)
    first, second = together(2, own, tmp_path / "out", "fp8")
    assert isinstance(first, EndedElsewhereError)
    assert isinstance(second, CheckpointError)
    assert f"{shard}: has changed since this run began" in str(second)


# Verification.


def verified(verify: Callable[..., VerifyReport], size: int, *folders: Path) -> list[VerifyReport | Exception]:
    def work(group: ProcessGroup) -> VerifyReport:
        return verify(*map(open_checkpoint, folders), group=group)

    return in_processes(size, work)


@pytest.fixture
def damaged(alone: Callable[..., Path], tmp_path: Path) -> Path:
    """Four tensors with a wrong bit, all over the files, a certificate line twice, one lost, and another config."""
    out = shutil.copytree(alone("fp8"), tmp_path / "damaged")
    for name in ("embed.weight", "layers.0.attn.wq_a.weight", EXPERT, "mtp.0.enorm.weight"):
        edit(out, name, lambda rows: rows[:1].__ixor__(16))
    lines = (out / CERTIFICATE_NAME).read_text().splitlines()
    lines.append(lines[20])
    del lines[30]
    (out / CERTIFICATE_NAME).write_text("\n".join(lines) + "\n")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))
    return out


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("verify", [verify_hashes, verify_values, verify_against])
def test_the_same_findings(
    verify: Callable[..., VerifyReport], size: int, native: Path, alone: Callable[..., Path], damaged: Path
) -> None:
    against = [] if verify is verify_hashes else [native]
    for folder, at_least in ((alone("fp8"), 0), (damaged, 4)):
        expected = verify(*map(open_checkpoint, [folder, *against]))
        assert len(expected.mismatches) >= at_least
        first, *others = verified(verify, size, folder, *against)
        assert first == expected
        # The others did their part of it.
        assert all(isinstance(other, VerifyReport) and other.verdicts.total() > 0 for other in others)


@pytest.mark.parametrize("verify", [verify_hashes, verify_values])
def test_a_process_that_verifies_another_checkpoint(
    verify: Callable[..., VerifyReport], native: Path, alone: Callable[..., Path], damaged: Path
) -> None:
    """A sound one would hide the damage that the first process leaves to it."""

    def work(group: ProcessGroup) -> VerifyReport:
        out = damaged if group.is_first else alone("fp8")
        return verify(*map(open_checkpoint, [out] if verify is verify_hashes else [out, native]), group=group)

    first = in_processes(2, work)[0]
    assert isinstance(first, CheckpointError)
    assert f"{damaged}: process 1 sees another checkpoint there than process 0" in str(first)


def test_a_damaged_certificate_is_named_once(alone: Callable[..., Path], tmp_path: Path) -> None:
    out = shutil.copytree(alone("fp8"), tmp_path / "out")
    text = (out / CERTIFICATE_NAME).read_text()
    (out / CERTIFICATE_NAME).write_text(text[: len(text) // 2])
    results = verified(verify_hashes, 3, out)
    assert [type(result) for result in results].count(CheckpointError) == 1
    assert {getattr(result, "exit_code", None) for result in results} == {3}


# Under torchrun. Each start takes a few seconds: it loads torch three times and more.


def torchrun(processes: int, *argv: str, restarts: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run `-m MODULE ...` in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, f"--max-restarts={restarts}", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=240,
        check=False,
    )


def test_one_process_killed_and_restarted_by_torchrun(native: Path, alone: Callable[..., Path], tmp_path: Path) -> None:
    out, snapshot = tmp_path / "out", tmp_path / "snapshot"
    struck = ["-m", "tests.checkpoint.struck_process", "one", str(snapshot)]
    done = torchrun(2, *struck, "convert", str(native), str(out), "--to", "fp8", "--json", restarts=1)
    assert done.returncode == 0, done.stderr
    before = json.loads(snapshot.read_text())
    assert json.loads(done.stdout)["resumed_shards"] >= len(before) >= 1
    assert_same_checkpoint(out, alone("fp8"))
    for name, seen in before.items():
        assert [(out / name).stat().st_ino, (out / name).stat().st_mtime_ns] == seen, f"{name} was written again"


@pytest.mark.slow
def test_all_processes_killed_then_continued_by_one_and_by_three(
    native: Path, alone: Callable[..., Path], tmp_path: Path
) -> None:
    out, snapshot = tmp_path / "out", tmp_path / "snapshot"
    command = ["convert", str(native), str(out), "--to", "bf16"]
    done = torchrun(2, "-m", "tests.checkpoint.struck_process", "all", str(snapshot), *command)
    assert done.returncode == 1
    assert list(out.glob("*.partial"))
    before = json.loads(snapshot.read_text())
    again = shutil.copytree(out, tmp_path / "again", copy_function=shutil.copy2)
    kept = finished(again)  # all that were, as others went on between the snapshot and their end
    assert kept.keys() >= before.keys()
    assert main(command) == 0
    assert_same_checkpoint(out, alone("bf16"))
    for name, seen in before.items():
        assert [(out / name).stat().st_ino, (out / name).stat().st_mtime_ns] == seen, f"{name} was written again"
    reports = together(3, native, again, "bf16")
    assert [getattr(report, "resumed_shards", report) for report in reports] == [len(kept)] * 3
    assert_same_checkpoint(again, alone("bf16"))


@pytest.mark.slow
def test_verify_under_torchrun(native: Path, damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", str(damaged), "--against", str(native), "--json"]
    done = torchrun(2, "-m", "v4quant", *command)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    capsys.readouterr()
    assert main(command) == 1
    alone, both = json.loads(capsys.readouterr().out), json.loads(done.stdout)
    assert {**alone, "seconds": 0} == {**both, "seconds": 0}
    assert len(both["mismatches"]) >= 4
