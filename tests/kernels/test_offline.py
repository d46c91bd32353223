"""Every kernel compiles at the shapes of Flash and Pro for real GPUs, and its machine code keeps within limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import v4quant.kernels
from v4quant.kernels._compile_case import SHARED_LIMIT_BYTES, TARGETS, modules_with_cases

FOLDER = Path(v4quant.kernels.__path__[0])


@pytest.mark.parametrize("module", modules_with_cases())
def test_compiles_within_limits(module: str) -> None:
    # In a process of its own: other tests may have imported Triton for its interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "v4quant.kernels._offline", "--json", module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["target"] for row in rows} == set(TARGETS)
    for row in rows:
        # Where a kernel wants more tensor memory than there is, Triton makes an empty one of a few registers.
        assert row["registers"] >= (8 if row["target"] == "gfx942" else 17), row
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED_LIMIT_BYTES[row["target"]], row
        assert row["tensor_memory_columns"] <= 512, row
        assert row["mma"] == row["expected_mma"], row
        assert row["load_bits"] >= row["expected_load_bits"], row
        assert row["moved_bytes"] >= row["least_bytes"] > 0, row


def test_every_op_with_a_kernel_has_cases() -> None:
    ops = [path.stem for path in FOLDER.glob("[a-z]*.py") if "use_triton(" in path.read_text(encoding="utf-8")]
    assert len(ops) > 15
    assert {f"_{op}_triton" for op in ops} <= set(modules_with_cases())
