"""What makes a comparison checkable by others: which bytes, which tokens, which versions, which machine."""

import contextlib
import hashlib
import os
import platform
from collections import Counter
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import v4quant
from v4quant.checkpoint.certificate import CERTIFICATE_NAME
from v4quant.checkpoint.files import Source
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.reader import Checkpoint
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.checkpoint.sharding.rank_tensors import Sharded
from v4quant.config import CONFIG_NAME, V4Config

# Keys of a config that say how weights are stored, not what is computed.
_STORAGE_KEYS = {"expert_dtype", "quantization_config"}
_HASH_BYTES = 4 * 2**20


def describe(checkpoint: Checkpoint | Sharded, how: str = "") -> dict[str, Any]:
    """A checkpoint: its place, form, and the hashes of what describes its bytes.

    Args:
        how: a sharded checkpoint's ranks were run: "virtual" or "processes". Hashes are those of the checkpoint that it
            was made from.
    """
    files = checkpoint.whole.files if isinstance(checkpoint, Sharded) else checkpoint.files
    return {
        "path": checkpoint.where,
        "release": checkpoint.release,
        "format": checkpoint.scheme.name,
        "source_id": checkpoint.source_id(),
        "index_sha256": _sha256(files, INDEX_NAME),
        "config_sha256": _sha256(files, CONFIG_NAME),
        "certificate_sha256": _sha256(files, CERTIFICATE_NAME),
        "bytes": checkpoint.bytes,
        "ranks": _ranks(checkpoint.grid, how) if isinstance(checkpoint, Sharded) else None,
    }


def _ranks(grid: Grid, how: str) -> dict[str, Any]:
    return {"how": how, "ranks": grid.ranks, "tp": grid.tp, "ep": grid.ep, "pp": grid.pp}


def _sha256(files: Source, name: str) -> str | None:
    if name not in files:
        return None
    digest, size = hashlib.sha256(), files.size(name)
    for start in range(0, size, _HASH_BYTES):
        digest.update(files.read(name, start, min(start + _HASH_BYTES, size)))
    return digest.hexdigest()


def bytes_by_role(checkpoint: Checkpoint | Sharded) -> dict[str, int]:
    """Bytes of tensor data by role, MTP blocks apart, as `inspect` counts them; of all ranks."""
    totals: Counter[str] = Counter()
    for part in checkpoint.ranks if isinstance(checkpoint, Sharded) else [checkpoint]:
        for name, entry in part.tensors.items():
            totals[part.parsed[name].group] += entry.bytes
    return dict(totals)


def config_differences(candidate: V4Config, reference: V4Config) -> list[dict[str, Any]]:
    """Keys of config.json that decide what is computed, and differ."""
    return [
        {"key": key, "reference": _plain(theirs), "candidate": _plain(ours)}
        for key in (item.name for item in fields(V4Config))
        if key not in _STORAGE_KEYS and (ours := getattr(candidate, key)) != (theirs := getattr(reference, key))
    ]


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def versions() -> dict[str, str]:
    """Of what computed."""
    found = {"v4quant": v4quant.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    with contextlib.suppress(metadata.PackageNotFoundError):  # no wheel for this system
        found["triton"] = metadata.version("triton")
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What computed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device": device.type, "cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
