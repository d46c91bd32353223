"""Checkpoints of any size that take no room: true headers, index and config, and a hole for tensor data."""

import os
from functools import cache
from pathlib import Path
from typing import Any

from v4quant.testing.releases import synth_config
from v4quant.testing.synth import plan_synth


@cache
def _files(like: str, cut: tuple[tuple[str, Any], ...]) -> dict[str, tuple[bytes, int]]:
    plan = plan_synth(*synth_config(like, **dict(cut)))
    weights = {shard.name: (shard.header, shard.file_bytes) for shard in plan.shards}
    return weights | {name: (data, len(data)) for name, data in plan.side_files.items()}


def write_sparse(folder: Path, like: str, **cut: Any) -> Path:
    """A checkpoint of true headers, index and config, whose tensor data is a hole."""
    for name, (data, size) in _files(like, tuple(sorted(cut.items()))).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        os.truncate(folder / name, size)
    return folder
