"""Routed experts in memory, or read from the checkpoint as they are asked for."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Barrier
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

# Threads that read, and groups of coded experts read ahead.
_READERS = 2
# Threads that run experts at most: each holds one in memory.
_MAX_WORKERS = 8
# Coded experts that are read and launched together on a GPU. On a CPU one by one: sums keep their order.
_GPU_GROUP = 16


def are_coded(reader: Reader) -> bool:
    """Whether a run takes routed experts as they are stored."""
    arithmetic = reader.arithmetic
    return (
        arithmetic.products is Products.CODED
        and arithmetic.activations is not Activations.NONE
        and reader.weights.scheme.expert != BF16
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
        self.held = range(reader.config.n_routed_experts)
        self.is_coded = are_coded(reader)
        self._numbers = numbers
        self._coded = _read_coded(reader, prefix, numbers) if self.is_coded else None
        self._decoded = [] if self.is_coded else [reader.expert(f"{prefix}{number}.") for number in numbers]

    def coded(self, experts: list[int]) -> Iterator[tuple[list[int], ExpertWeights]]:
        """All in one group: those that were not picked cost nothing."""
        if experts and self._coded is not None:
            yield self._numbers, self._coded

    def each(self, experts: list[int], run: Callable[[int, Expert], _Value]) -> Iterator[_Value]:
        """What `run` makes of these, one by one."""
        return (run(number, self._decoded[number]) for number in experts)


class ExpertReader:
    """Threads that read experts ahead into buffers that are used again and again, and threads that run them.

    A product of the few tokens of one expert is too small to be shared between cores, so each thread runs an expert of
    its own, with its share of the cores.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        cores = torch.get_num_threads()
        workers = min(cores, _MAX_WORKERS) if reader.device.type == "cpu" else 1
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read experts")
        self._workers = _pool(workers, cores // workers)
        self._buffers = [(Buffers(), Buffers(), Buffers()) for _ in range(workers + _READERS + 1)]

    def close(self) -> None:
        """Stop the threads."""
        self._readers.shutdown(cancel_futures=True)
        self._workers.shutdown(cancel_futures=True)

    def coded(self, prefix: str, experts: list[int]) -> Iterator[tuple[list[int], ExpertWeights]]:
        """Experts as they are stored, in groups."""
        size = 1 if self.reader.device.type == "cpu" else _GPU_GROUP
        groups = [experts[first : first + size] for first in range(0, len(experts), size)]
        pending: deque[tuple[list[int], Future[ExpertWeights]]] = deque()
        for group in groups:
            pending.append((group, self._readers.submit(_read_coded, self.reader, prefix, group)))
            if len(pending) > _READERS:
                yield _result(pending)
        while pending:
            yield _result(pending)

    def each(self, prefix: str, experts: list[int], run: Callable[[int, Expert], _Value]) -> Iterator[_Value]:
        """What `run` makes of each of these experts, in this order."""
        inference = torch.is_inference_mode_enabled()

        def run_read(number: int, expert: Future[Expert]) -> _Value:
            with torch.inference_mode(inference):  # a mode of each thread
                return run(number, expert.result())

        pending: deque[Future[_Value]] = deque()
        try:
            for place, number in enumerate(experts):
                if len(pending) == len(self._buffers):
                    yield pending.popleft().result()  # and its buffers are free
                buffers = self._buffers[place % len(self._buffers)]
                expert = self._readers.submit(self.reader.packed_expert, f"{prefix}{number}.", buffers)
                pending.append(self._workers.submit(run_read, number, expert))
            while pending:
                yield pending.popleft().result()
        finally:
            wait(pending)  # they use the buffers


def _pool(threads: int, cores: int) -> ThreadPoolExecutor:
    """Threads whose torch operations use so many cores each; those of other threads stay as they are."""
    started = Barrier(threads)

    def start() -> None:
        torch.get_num_threads()  # or the thread's first operation sets what holds for all
        torch.set_num_threads(cores)
        started.wait()

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "experts")
    wait([pool.submit(start) for _ in range(threads)])
    torch.set_num_threads(before)  # what threads to come begin with was changed too
    return pool


def _result(pending: "deque[tuple[_Key, Future[_Value]]]") -> tuple[_Key, _Value]:
    key, future = pending.popleft()
    return key, future.result()


class StreamedExperts:
    """The routed experts of a block, read when they are asked for."""

    def __init__(self, experts: ExpertReader, kind: str, index: int) -> None:
        self.held = experts.reader.experts
        self.is_coded = are_coded(experts.reader)
        self._experts = experts
        self._prefix = f"{block_prefix(kind, index)}ffn.experts."

    def coded(self, experts: list[int]) -> Iterator[tuple[list[int], ExpertWeights]]:
        """These, in groups as they are read."""
        return self._experts.coded(self._prefix, experts)

    def each(self, experts: list[int], run: Callable[[int, Expert], _Value]) -> Iterator[_Value]:
        """What `run` makes of these, as they are read."""
        return self._experts.each(self._prefix, experts, run)
