"""Small checkpoints to plant faults in, and what is in a folder, told without the code under test."""

import hashlib
from pathlib import Path

from v4quant.checkpoint.header import read_header
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.parity.selftest.reduce import reduce_checkpoint

Stored = tuple[str, tuple[int, ...], bytes]  # dtype, shape, data


def reduced(source: Path, out: Path) -> Path:
    """A small checkpoint of another; smaller than by default, to be quick."""
    reduce_checkpoint(open_checkpoint(source), out, max_experts=6, max_vocabulary=64)
    return out


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by path within the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tensors(folder: Path) -> dict[tuple[str, str], Stored]:
    """Every tensor of every shard whose header can be read, by file and name."""
    found: dict[tuple[str, str], Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        _, entries = read_header(path.name, len(data), lambda start, stop, data=data: data[start:stop])  # type: ignore[misc]
        found |= {(path.name, e.name): (e.dtype, e.shape, data[e.start : e.stop]) for e in entries.values()}
    return found
