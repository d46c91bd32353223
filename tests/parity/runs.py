"""Comparisons of the reference checkpoints and of synthetic ones, for the tests of this folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.model.references import Reference
from v4quant.checkpoint.apply import apply
from v4quant.checkpoint.plan import make_plan
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.formats import format_named
from v4quant.parity.compare import Comparison, Task, compare
from v4quant.parity.prompts import Prompts, built_prompts
from v4quant.parity.stored import StoredOutputs


def compared(candidate: Path, reference: Path, prompts: Prompts | None = None, **options: Any) -> Comparison:
    """Compare two checkpoints, by default on the tokens built for the reference."""
    theirs = open_checkpoint(reference)
    prompts = prompts or built_prompts(theirs.config, None, None)
    return compare(Task(open_checkpoint(candidate), theirs, prompts, **options))


def compared_with_stored(reference: Reference) -> Comparison:
    """Compare a reference checkpoint, run here, with its stored outputs."""
    checkpoint = open_checkpoint(reference.folder)
    stored = StoredOutputs(reference.outputs, checkpoint.config)
    prompts = Prompts.of([stored.input_ids], stored.prefill, checkpoint.config, "stored")
    return compare(Task(checkpoint, stored, prompts))


def converted(source: Path, out: Path, target: str) -> Path:
    """Convert a checkpoint; roundings are allowed."""
    apply(make_plan(open_checkpoint(source), format_named(target)), out, allow_rounding=True)
    return out


def edited(source: Path, out: Path, name: str, change: Callable[[torch.Tensor], object]) -> Path:
    """Copy a checkpoint and change the stored numbers of one tensor in place.

    Args:
        change: given a view of the bytes in the tensor's dtype and shape; FP4 codes, FP8 and scales as uint8.
    """
    shutil.copytree(source, out)
    for path in out.iterdir():
        path.chmod(0o644)
    entry = open_checkpoint(out).tensors[name]
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}.get(entry.dtype, torch.uint8)
    with (out / entry.file).open("r+b") as file:
        file.seek(entry.start)
        data = bytearray(file.read(entry.bytes))
        change(torch.frombuffer(data, dtype=dtype).view(entry.shape))
        file.seek(entry.start)
        file.write(data)
    return out


def with_config(source: Path, out: Path, **keys: Any) -> Path:
    """Copy a checkpoint and set keys of its config.json."""
    shutil.copytree(source, out)
    path = out / "config.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return out
