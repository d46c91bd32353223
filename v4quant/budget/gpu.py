"""Which formats fit on given GPUs, and with how much context: arithmetic over weights and caches, no measurement.

V4 has one KV head, so a cache cannot be cut by heads. Two ways to spread a model over N GPUs:

    tensor parallel      weights / N on each GPU, and the cache of every sequence on each
    expert parallel      routed experts / N on each, all other weights whole; each sequence lives on one GPU

Of each GPU's memory 90 % is taken for both; the rest is left to activations, workspaces and the driver. The whole
checkpoint is loaded, MTP blocks included, and each sequence has the compressors' FP32 state besides its cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from v4quant.budget.kv_cache import compressor_state_bytes, kv_bytes, served_layout
from v4quant.config import V4Config
from v4quant.errors import UsageError

USABLE_SHARE = 0.9
# MiB, as nvidia-smi reports the total.
GPU_MEMORY_MIB: Mapping[str, int] = {
    "a100": 81_920,
    "h100": 81_559,
    "h20": 97_871,
    "h200": 143_771,
    "b200": 183_359,
    "b300": 275_040,
}
_BLOCK_TOKENS = 128  # a block of the cache: 32 CSA entries and 1 HCA entry


@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits in one way of spreading it.

    Attributes:
        weight_bytes: on each GPU.
        max_context: the longest context of `batch` sequences at once, a multiple of 128, at most what the model takes;
            0 where the weights alone do not fit, or no sequence beside them.
        sequences: sequences of `context` tokens that fit on all GPUs together.
        fits: True where `batch` sequences of `context` tokens do.
    """

    weight_bytes: int
    max_context: int
    sequences: int
    fits: bool


@dataclass(frozen=True)
class Load:
    """What is to run: sequences at once, and tokens of each."""

    context: int
    batch: int


def usable_bytes(gpu: str) -> int:
    """Memory of a GPU that weights and caches may take.

    Raises:
        UsageError: if the GPU is none that is known; the message lists those that are.
    """
    memory = GPU_MEMORY_MIB.get(gpu.lower())
    if memory is None:
        raise UsageError(f"--gpu is {gpu!r}, expected one of: {', '.join(GPU_MEMORY_MIB)}")
    return int(USABLE_SHARE * memory * 2**20)


def fits(config: V4Config, by_role: Mapping[str, int], load: Load, gpu: str, gpus: int) -> dict[str, Fit]:
    """Fit one checkpoint in both ways, "tensor_parallel" and "expert_parallel".

    Args:
        by_role: bytes of the checkpoint by role, as inventory.bytes_by_group gives them.

    Raises:
        UsageError: if the GPU is none that is known.
    """
    total = sum(by_role.values())
    experts = sum(size for role, size in by_role.items() if role.removeprefix("mtp.") == "routed_experts")
    room = usable_bytes(gpu)
    return {
        "tensor_parallel": _fit(config, room, -(-total // gpus), load, copies=1, on_each=load.batch),
        "expert_parallel": _fit(
            config,
            room,
            total - experts + -(-experts // gpus),
            load,
            copies=gpus,
            on_each=-(-load.batch // gpus),
        ),
    }


def _fit(config: V4Config, room: int, weight_bytes: int, load: Load, *, copies: int, on_each: int) -> Fit:
    """One GPU that holds `on_each` sequences of the load; `copies` GPUs hold others."""
    left = room - weight_bytes
    sequences = max(left, 0) // _sequence_bytes(config, load.context)
    return Fit(
        weight_bytes=weight_bytes,
        max_context=_longest(config, left // on_each),
        sequences=sequences * copies,
        fits=sequences >= on_each,
    )


def _sequence_bytes(config: V4Config, context: int) -> int:
    return kv_bytes(config, context, served_layout(config)) + compressor_state_bytes(config)


def _longest(config: V4Config, room: int) -> int:
    """The longest context of a sequence in so many bytes, in whole blocks."""
    low, high = 0, config.max_position_embeddings // _BLOCK_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        if _sequence_bytes(config, middle * _BLOCK_TOKENS) <= room:
            low = middle
        else:
            high = middle - 1
    return low * _BLOCK_TOKENS
