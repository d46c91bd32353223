"""How much memory the whole model takes, told from headers before any of it is read, and how much there is.

Weights lie as the run multiplies with them: quantised matrices decoded to BF16, or as stored (arithmetic.py), router
and compressors in FP32. Embedding rows are read when they are asked for, and MTP blocks not at all.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from v4quant.checkpoint.reader import Checkpoint
from v4quant.config import V4Config
from v4quant.errors import UsageError
from v4quant.model.arithmetic import Activations, Arithmetic, Products
from v4quant.model.cache import PAGE_TOKENS
from v4quant.model.generation import PREFILL_TOKENS
from v4quant.model.operations import operations
from v4quant.names import Role, TensorName
from v4quant.words import decimal_bytes

_BF16_BYTES, _F32_BYTES = 2, 4
# A prefill's activations besides the streams themselves, as multiples of them: inputs, outputs and FP32 copies.
_COPIES_OF_STREAMS = 8
# torch, its threads, and buffers that matrices are read and decoded in.
_PROCESS_BYTES = 450 * 10**6
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Needs:
    """Bytes that a whole model takes.

    Attributes:
        weights: of all layers and the head.
        cache: of all layers, for one sequence.
        work: activations of a piece of a prefill, the head in FP32, torch itself.
    """

    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.work


def needs_of(checkpoint: Checkpoint, arithmetic: Arithmetic, tokens: int) -> Needs:
    """What running a checkpoint takes.

    Args:
        tokens: positions of the sequence.

    Raises:
        CheckpointError: if the checkpoint has problems.
    """
    checkpoint.require_sound()
    config = checkpoint.config
    weights = 0
    for tensor in checkpoint.logical:
        parsed = checkpoint.parsed[tensor.name]
        if parsed.block != "mtp" and parsed.role is not Role.EMBEDDING:
            weights += _bytes_of(checkpoint, parsed, arithmetic)
    return Needs(weights, _cache_bytes(config, arithmetic, tokens), _work_bytes(config, tokens))


def _bytes_of(checkpoint: Checkpoint, name: TensorName, arithmetic: Arithmetic) -> int:
    """Bytes of a tensor in memory, with its scale where it keeps one."""
    entry = checkpoint.tensors[name.name]
    scale = checkpoint.tensors.get(f"{name.name.removesuffix('weight')}scale") if name.is_quantised else None
    if scale is None:
        # Router and compressors are taken in FP32, however they are stored.
        is_wide = name.leaf == "weight" and (name.role is Role.ROUTER or name.module.endswith(("wkv", "wgate")))
        is_wide &= not name.is_quantised
        return entry.bytes // _BF16_BYTES * _F32_BYTES if is_wide and entry.dtype == "BF16" else entry.bytes
    is_coded = arithmetic.products is Products.CODED and arithmetic.activations is not Activations.NONE
    if is_coded and not name.module.endswith("wo_a"):  # its product goes group by group, decoded
        return entry.bytes + scale.bytes
    values = 2 * entry.bytes if entry.dtype == "I8" else entry.bytes  # two FP4 codes a byte
    return values * _BF16_BYTES


def _cache_bytes(config: V4Config, arithmetic: Arithmetic, tokens: int) -> int:
    """Pages of all layers. A pool doubles as it grows, so that it may be twice as large as what is in it."""
    ops = operations(config, arithmetic)
    cpu = torch.device("cpu")
    window = min(tokens, config.sliding_window + PREFILL_TOKENS) // PAGE_TOKENS + 2
    compressed = tokens // PAGE_TOKENS + 1
    total = 0
    for ratio in config.compress_ratios[: config.num_hidden_layers]:
        total += 2 * window * ops.kv_codec(PAGE_TOKENS).empty_pages(1, cpu).nbytes
        if ratio:
            total += 2 * compressed * ops.kv_codec(PAGE_TOKENS // ratio).empty_pages(1, cpu).nbytes
        if ratio == 4:
            total += 2 * compressed * ops.key_codec(PAGE_TOKENS // ratio).empty_pages(1, cpu).nbytes
    return total


def _work_bytes(config: V4Config, tokens: int) -> int:
    streams = min(tokens, PREFILL_TOKENS) * config.hc_mult * config.hidden_size * _BF16_BYTES
    head = min(config.vocab_size, 8192) * config.hidden_size * _F32_BYTES
    return _COPIES_OF_STREAMS * streams + head + _PROCESS_BYTES


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [own for own in (_available(), _left_in_cgroup()) if own is not None]
    return min(known, default=None)


def _available() -> int | None:
    """What Linux thinks new processes can have without swapping."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _left_in_cgroup() -> int | None:
    """What a container's limit (cgroup v2) leaves, pages of files not counted; None where there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))  # "max" for none
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        held = dict(line.split() for line in lines)
        files = int(held["file"]) - int(held["shmem"])
        return max(limit - int((_CGROUP / "memory.current").read_text(encoding="ascii")) + files, 0)
    return None


def require_fits(needs: Needs, free: int | None, where: str) -> None:
    """Refuse to load what does not fit.

    Args:
        free: bytes that there are; None for not known, which refuses nothing.
        where: what to call the checkpoint.

    Raises:
        UsageError: if it does not fit.
    """
    if free is not None and needs.total > free:
        raise UsageError(
            f"{where}: in memory it takes {describe(needs)}, and {decimal_bytes(free)} is free",
            hint="For models of any size, one layer in memory: v4quant parity and v4quant reference.",
        )


def describe(needs: Needs) -> str:
    """The sum, and what it consists of."""
    parts = {"weights": needs.weights, "cache": needs.cache, "work": needs.work}
    return f"{decimal_bytes(needs.total)} ({', '.join(f'{name} {decimal_bytes(own)}' for name, own in parts.items())})"
