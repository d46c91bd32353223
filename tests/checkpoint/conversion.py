"""What the conversion tests share: small checkpoints, one-call conversions, and outputs read by safetensors alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import safetensors
import torch

from v4quant.checkpoint.apply import ApplyReport, apply
from v4quant.checkpoint.header import TensorEntry, build_header, read_header
from v4quant.checkpoint.plan import Plan, make_plan
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.formats import format_named
from v4quant.testing.releases import synth_config
from v4quant.testing.synth import write_checkpoint

Array = npt.NDArray[Any]
DATA = Path(__file__).parents[1] / "data"
REFERENCES = sorted((DATA / "reference").iterdir())
# Only on machines that have the whole set of reference checkpoints beside the repository.
REFERENCES += [path for path in [DATA.parents[2] / "shared" / "reference" / "tiny-pro"] if path.exists()]

_NUMPY_OF_TORCH = {
    torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
    torch.float8_e4m3fn: (torch.uint8, np.dtype(ml_dtypes.float8_e4m3fn)),
    torch.float8_e8m0fnu: (torch.uint8, np.dtype(ml_dtypes.float8_e8m0fnu)),
}


def write_small(folder: Path, like: str = "flash", *, mtp: bool = False, experts: int = 2, seed: int = 0) -> Path:
    """Write a synthetic checkpoint of one layer; the smallest has three shards and 47 tensors."""
    config_json, scheme = synth_config(like, tiny=True, layers=1, experts=experts, mtp=mtp)
    write_checkpoint(folder, config_json, scheme, seed)
    return folder


def plan_of(source: Path, to: str, like: Path | None = None, **options: Any) -> Plan:
    """Plan a conversion between folders; options are those of `make_plan`."""
    original = open_checkpoint(like) if like else None
    return make_plan(open_checkpoint(source), format_named(to), like=original, **options)


def convert(source: Path, out: Path, to: str, like: Path | None = None, **options: Any) -> ApplyReport:
    """Plan and apply; options are those of `apply`."""
    return apply(plan_of(source, to, like), out, **options)


def stored(folder: Path) -> dict[str, Array]:
    """Every tensor that safetensors finds in a folder, in numpy's dtypes or those of ml_dtypes."""
    found: dict[str, Array] = {}
    for name, tensor in stored_torch(folder).items():
        bits, dtype = _NUMPY_OF_TORCH.get(tensor.dtype, (tensor.dtype, None))
        array = tensor.view(bits).numpy()
        found[name] = array if dtype is None else array.view(dtype)
    return found


def stored_torch(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that safetensors finds in a folder, in torch's dtypes."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return found


def find(folder: Path, name: str) -> tuple[Path, TensorEntry]:
    """The file that holds a tensor, and where in it."""
    entry = open_checkpoint(folder).tensors[name]
    return folder / entry.file, entry


def edit(folder: Path, name: str, change: Callable[[npt.NDArray[np.uint8]], object]) -> None:
    """Change the stored bytes of a tensor in place: `change` gets them as uint8 [first dimension, bytes a row]."""
    path, entry = find(folder, name)
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    change(data[entry.start : entry.stop].reshape(entry.shape[0] if entry.shape else 1, -1))
    path.write_bytes(data.tobytes())


Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # name -> dtype, shape, data


def rewrite(path: Path, change: Callable[[Tensors], object]) -> None:
    """Change which tensors a weight file holds, their dtypes and shapes; the header follows, the index does not."""
    data = path.read_bytes()
    _, entries = read_header(path.name, len(data), lambda start, stop: data[start:stop])
    tensors = {name: (e.dtype, e.shape, data[e.start : e.stop]) for name, e in entries.items()}
    change(tensors)
    header, placed = build_header([(name, t[0], t[1]) for name, t in tensors.items()], file=path.name)
    path.write_bytes(header + b"".join(tensors[entry.name][2] for entry in placed))
