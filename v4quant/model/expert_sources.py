"""Routed experts in memory, or read from the checkpoint as they are asked for."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import TypeVar

import torch

from v4quant.checkpoint.weights import Buffers
from v4quant.encodings import BF16
from v4quant.kernels.fp4_expert_gemm import ExpertWeights
from v4quant.model.arithmetic import Activations, Products
from v4quant.model.weights import Expert, Reader
from v4quant.names import block_prefix

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

# Experts read ahead, and the one in use.
_DEPTH = 3
# Coded experts that are read and launched together on a GPU. On a CPU one by one: sums keep their order.
_GPU_GROUP = 16


def are_coded(reader: Reader) -> bool:
    """Whether a run takes routed experts as they are stored."""
    arithmetic = reader.arithmetic
    return (
        arithmetic.products is Products.CODED
        and arithmetic.activations is not Activations.NONE
        and reader.weights.checkpoint.scheme.expert != BF16
    )


def _read_coded(reader: Reader, prefix: str, numbers: list[int]) -> ExpertWeights:
    """Experts as they are stored, one below the other."""
    parts: list[torch.Tensor] = []
    for name in ("w1", "w3", "w2"):
        pairs = [reader.weights.codes(f"{prefix}{number}.{name}") for number in numbers]
        codes = torch.stack([pair[0].view(torch.uint8) for pair in pairs]).view(pairs[0][0].dtype)
        parts += [codes.to(reader.device), torch.stack([pair[1] for pair in pairs]).to(reader.device)]
    return ExpertWeights(*parts)


class ResidentExperts:
    """All routed experts of a block, in memory."""

    def __init__(self, reader: Reader, kind: str, index: int) -> None:
        """Read them.

        Raises:
            CheckpointError: if one is missing or damaged.
        """
        prefix = f"{block_prefix(kind, index)}ffn.experts."
        numbers = list(range(reader.config.n_routed_experts))
        self.is_coded = are_coded(reader)
        self._numbers = numbers
        self._coded = _read_coded(reader, prefix, numbers) if self.is_coded else None
        self._decoded = [] if self.is_coded else [reader.expert(f"{prefix}{number}.") for number in numbers]

    def coded(self, experts: list[int]) -> Iterator[tuple[list[int], ExpertWeights]]:
        """All in one group: those that were not picked cost nothing."""
        if experts and self._coded is not None:
            yield self._numbers, self._coded

    def decoded(self, experts: list[int]) -> Iterator[tuple[int, Expert]]:
        """These, one by one."""
        return ((number, self._decoded[number]) for number in experts)


class ExpertReader:
    """One thread that reads experts ahead, into buffers that are used again and again."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self._buffers = [(Buffers(), Buffers(), Buffers()) for _ in range(_DEPTH)]

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(cancel_futures=True)

    def coded(self, prefix: str, experts: list[int]) -> Iterator[tuple[list[int], ExpertWeights]]:
        """Experts as they are stored, in groups."""
        size = 1 if self.reader.device.type == "cpu" else _GPU_GROUP
        groups = [experts[first : first + size] for first in range(0, len(experts), size)]
        pending: deque[tuple[list[int], Future[ExpertWeights]]] = deque()
        for group in groups:
            pending.append((group, self._thread.submit(_read_coded, self.reader, prefix, group)))
            if len(pending) == _DEPTH:
                yield _result(pending)
        while pending:
            yield _result(pending)

    def decoded(self, prefix: str, experts: list[int]) -> Iterator[tuple[int, Expert]]:
        """Experts in BF16, each valid until the next one is asked for."""
        pending: deque[tuple[int, Future[Expert]]] = deque()
        for number, buffers in zip(experts, cycle(self._buffers), strict=False):
            pending.append((number, self._thread.submit(self.reader.expert, f"{prefix}{number}.", buffers)))
            # One buffer is in the caller's hands: it is back when the caller asks for more.
            if len(pending) == _DEPTH:
                yield _result(pending)
        while pending:
            yield _result(pending)


def _result(pending: "deque[tuple[_Key, Future[_Value]]]") -> tuple[_Key, _Value]:
    key, future = pending.popleft()
    return key, future.result()


class StreamedExperts:
    """The routed experts of a block, read when they are asked for."""

    def __init__(self, experts: ExpertReader, kind: str, index: int) -> None:
        self.is_coded = are_coded(experts.reader)
        self._experts = experts
        self._prefix = f"{block_prefix(kind, index)}ffn.experts."

    def coded(self, experts: list[int]) -> Iterator[tuple[list[int], ExpertWeights]]:
        """These, in groups as they are read."""
        return self._experts.coded(self._prefix, experts)

    def decoded(self, experts: list[int]) -> Iterator[tuple[int, Expert]]:
        """These, one by one as they are read."""
        return self._experts.decoded(self._prefix, experts)
