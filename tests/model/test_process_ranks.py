"""Ranks as processes under torchrun: the very bits of virtual ranks, and an end for all when one ends."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import tests
from tests.model.cut import GRIDS, cut
from tests.model.references import named
from tests.model.run_ranks import outputs
from v4quant.checkpoint.process_group import ProcessGroup
from v4quant.checkpoint.process_store import LostProcessError
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.errors import UsageError
from v4quant.model.arithmetic import Arithmetic
from v4quant.model.process_ranks import ProcessRanks, require_processes
from v4quant.model.ranked import virtual_model

BASE = named("tiny-base")
ROOT = Path(tests.__file__).parents[1]


def run_ranks(processes: int, fault: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Start so many processes, have them run one checkpoint after the other, and wait for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(ROOT / "tests/model/run_ranks.py"), fault, *map(str, folders)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("grids", [["tp2", "ep2"], ["tp2 x ep2"]], ids=", ".join)
def test_processes_have_the_bits_of_virtual_ranks(grids: list[str], tmp_path: Path) -> None:
    """Several checkpoints of as many ranks one after the other, as a start takes as long as ten of them."""
    sharded = [cut(BASE.folder, tmp_path / grid, GRIDS[grid]) for grid in grids]
    done = run_ranks(GRIDS[grids[0]].ranks, "none", *(tmp_path / grid for grid in grids))
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for grid, ranks in zip(grids, sharded, strict=True):
            with torch.inference_mode(), virtual_model(ranks, Arithmetic(), "cpu") as model:
                expected = outputs(model)
            found = torch.load(tmp_path / f"{grid}.pt")
            assert len(found) == len(expected) == 4
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(cores)


@pytest.mark.parametrize("fault", ["error", pytest.param("killed", marks=pytest.mark.slow)])
def test_all_end_when_one_does(fault: str, tmp_path: Path) -> None:
    """At once, and with one message: the rank's own, or torchrun's of the one that was killed."""
    cut(BASE.folder, tmp_path / "cut", GRIDS["tp2"])
    done = run_ranks(2, fault, tmp_path / "cut")
    assert done.returncode == 1
    assert not (tmp_path / "cut.pt").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: this rank has had enough"] if fault == "error" else "SIGKILL" in done.stderr
    assert 'run_ranks.py", line' not in done.stderr, "torchrun shows where it failed itself; the ranks do not"


def test_what_never_returns_is_left_when_another_process_is_lost() -> None:
    """A process that is stopped while it connects, or while it sends."""

    class Group(ProcessGroup):
        def check(self) -> None:
            raise LostProcessError("process 1 of 2 has not been heard of")

    ranks, over = ProcessRanks.__new__(ProcessRanks), threading.Event()
    ranks._group = Group()
    with pytest.raises(LostProcessError, match="has not been heard of"):
        ranks._aside(over.wait)
    over.set()
    ranks._group = ProcessGroup()
    assert ranks._aside(over.is_set) is True
    with pytest.raises(LostProcessError, match="lost another process of this job: Connection closed"):
        ranks._aside(_closed)


def _closed() -> None:
    raise RuntimeError("Connection closed by peer")


def test_as_many_processes_as_ranks() -> None:
    require_processes(Grid(2, 2), 4)
    with pytest.raises(
        UsageError, match=r"3 processes were started for a checkpoint of 4 ranks \(--tp 2 --ep 2"
    ) as told:
        require_processes(Grid(2, 2), 3)
    assert "torchrun --nproc-per-node 4 -m v4quant" in told.value.hint
