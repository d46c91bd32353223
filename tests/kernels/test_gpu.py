"""Every op on a GPU, at the shapes of Flash and Pro, against its torch reference on the same device.

On CPUs the runs themselves are checked, at small sizes and op against itself, so that none is broken when a GPU comes.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import v4quant.kernels
import v4quant.testing
from v4quant.testing.op_run import FLASH, PRO, TINY, OpRun, Sizes, tensors
from v4quant.testing.op_runs_attention import ATTENTION_RUNS
from v4quant.testing.op_runs_dense import DENSE_RUNS

RUNS = {**DENSE_RUNS, **ATTENTION_RUNS}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("sizes", [FLASH, PRO], ids=lambda sizes: sizes.name)
@pytest.mark.parametrize("name", RUNS)
def test_equals_the_reference(name: str, sizes: Sizes, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("V4QUANT_KERNELS", raising=False)
    assert not torch.backends.cuda.matmul.allow_tf32, "references would lose precision"
    RUNS[name](replace(sizes, experts=16), tokens, "cuda").check()


@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize("name", RUNS)
def test_runs_are_sound(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V4QUANT_KERNELS", "torch")
    run = RUNS[name](TINY, tokens, "cpu")
    run.check()
    written = sum(tensor.nbytes for tensor in tensors(run.op()))
    assert run.moved_bytes > 0 and run.flops >= 0
    if name in DENSE_RUNS:
        assert run.moved_bytes > written


@pytest.mark.parametrize("name", RUNS)
def test_a_difference_is_found(name: str) -> None:
    run = RUNS[name](TINY, 129, "cpu")
    expected = tensors(run.reference())
    found = [tensor.clone() for tensor in expected]
    flat = found[0].view(torch.uint8).flatten()
    flat[: flat.numel() // 3] ^= 0x55
    with pytest.raises(AssertionError):
        OpRun(lambda: found, lambda: expected, run.compare, 1).check()


def test_every_op_has_a_run() -> None:
    folder = Path(v4quant.kernels.__path__[0])
    ops = {path.stem for path in folder.glob("[a-z]*.py") if "use_triton(" in path.read_text(encoding="utf-8")}
    ran = "".join(path.read_text(encoding="utf-8") for path in Path(v4quant.testing.__path__[0]).glob("op_runs_*.py"))
    assert {op for op in ops if f"v4quant.kernels.{op} import" not in ran} == set()


def test_the_benchmark_goes_through_every_run() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"
    command = [sys.executable, str(script), "--dry-run", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not timed" not in done.stdout
    assert [line.count(" us ") for line in done.stdout.splitlines()] == [0] + [1] * (2 * len(RUNS))
