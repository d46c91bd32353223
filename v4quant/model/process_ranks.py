"""Ranks as processes that torchrun has started: one a rank, NCCL between GPUs, gloo for all else.

Tensors are gathered whole and added up by every rank for itself (ranks.py), so bits are those of virtual ranks. Orders
and answers are pickled: they go between processes of one job, which trust each other. Whoever waits looks now and then
whether the others are still at work (process_group.py), so that all end when one does.
"""

import contextlib
import datetime
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import distributed

from v4quant.checkpoint.process_group import ProcessGroup
from v4quant.checkpoint.process_store import LOST_HINT, LostProcessError
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.checkpoint.sharding.rank_tensors import Sharded
from v4quant.errors import CheckpointError, UsageError
from v4quant.model.ranks import Alone, Group, Ranks, Take
from v4quant.model.virtual_ranks import Worker, ranks_in_common

# A rank waits for as long as the others live: for hours, where the first one runs a reference.
_FOREVER = datetime.timedelta(days=365)
_POLL_SECONDS, _MAX_POLL_SECONDS = 1e-4, 0.02
_FIRST = 0
_Made = TypeVar("_Made")


class ProcessRanks:
    """All ranks of a grid, this process being one of them; a context manager.

    The first process asks with `call`; the others `serve`.
    """

    def __init__(self, grid: Grid, group: ProcessGroup, device: torch.device) -> None:
        """Connect the processes.

        Args:
            group: of the job.
            device: where this process computes.

        Raises:
            UsageError: if there are not as many processes as ranks.
            LostProcessError: if another process has died.
        """
        require_processes(grid, group.size)
        self._group = group
        self._worker: Worker | None = None
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = group.store_part("ranks")

        def connect() -> Ranks:
            distributed.init_process_group(
                backend, store=store, rank=group.rank, world_size=group.size, timeout=_FOREVER
            )
            return self._connected(grid)

        self.ranks = self._aside(connect)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:  # else others may wait in the middle of something, and nothing can be parted in order
            distributed.destroy_process_group()

    def start(self, setup: Any, worker: Worker) -> None:
        """In the first process: begin, with its own worker.

        Args:
            setup: what the others make theirs of.
        """
        self._worker = worker
        self._broadcast(setup)

    def call(self, order: Any) -> list[Any]:
        """In the first process: ask every rank the same; their answers, in rank order.

        Raises:
            V4QuantError: that of this process's own rank, or EndedElsewhereError for another's.
        """
        assert self._worker is not None, "start comes first"
        self._broadcast(order)
        return self._collect(self._worker.do(order))

    def close(self, *, in_order: bool) -> None:
        """In the first process: let the others go, if the run came to its end in order."""
        if self._worker is not None:
            self._worker.close()
        if in_order:
            self._broadcast(None)

    def serve(self, make: Callable[[Any], Worker]) -> None:
        """In every other process: do what is asked until the end.

        Args:
            make: makes the worker of the setup.
        """
        worker = make(self._broadcast(None))
        try:
            with torch.inference_mode():
                while (order := self._broadcast(None)) is not None:
                    self._collect(worker.do(order))
        finally:
            worker.close()

    def _connected(self, grid: Grid) -> Ranks:
        """This rank with its groups; every process makes all groups, in the same order."""
        place = grid.place(self._group.rank)
        tensor = self._own_group(ranks_in_common(grid, lambda own: (own.stage, own.ep_rank)))
        stage = self._own_group(ranks_in_common(grid, lambda own: (own.stage, 0)))
        return Ranks(place, tensor, stage)

    def _own_group(self, groups: dict[tuple[int, int], list[int]]) -> Group:
        own: Group = Alone()
        for members in groups.values():
            if len(members) > 1:
                handle = distributed.new_group(members, timeout=_FOREVER)
                if self._group.rank in members:
                    own = _ProcessesGroup(self, handle, members.index(self._group.rank), len(members))
        return own

    def _broadcast(self, message: Any) -> Any:
        """The first process's message, to all."""
        is_first = self._group.rank == _FIRST
        data = _bytes_of(message) if is_first else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(data)])
        self.wait(lambda: distributed.broadcast(size, _FIRST, async_op=True))
        if not is_first:
            data = torch.empty(int(size), dtype=torch.uint8)
        self.wait(lambda: distributed.broadcast(data, _FIRST, async_op=True))
        return message if is_first else _message_of(data)

    def _collect(self, answer: Any) -> list[Any]:
        """Every rank's answer, to the first process."""
        is_first = self._group.rank == _FIRST
        data = torch.empty(0, dtype=torch.uint8) if is_first else _bytes_of(answer)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self._group.size)]
        self.wait(lambda: distributed.all_gather(sizes, torch.tensor([len(data)]), async_op=True))
        if not is_first:
            self._aside(lambda: distributed.send(data, _FIRST))
            return []
        found = [torch.empty(int(size), dtype=torch.uint8) for size in sizes[1:]]
        self._aside(lambda: [distributed.recv(own, rank) for rank, own in enumerate(found, start=1)])
        return [answer, *map(_message_of, found)]

    def wait(self, begin: Callable[[], Any]) -> None:
        """Begin something and wait until it is done, for as long as all processes live.

        Raises:
            EndedElsewhereError: if another process has failed.
            LostProcessError: if another process has died.
        """
        with self._lost_errors():
            work, pause = begin(), _POLL_SECONDS
            while not work.is_completed():
                self._group.check()
                time.sleep(pause)
                pause = min(2 * pause, _MAX_POLL_SECONDS)
            work.wait()

    def _aside(self, call: Callable[[], _Made]) -> _Made:
        """What a call returns that waits for others and cannot be asked whether it is done; as `wait`.

        A thread makes it, which is left behind where others have died: nothing can end such a call.
        """
        made: Future[_Made] = Future()

        def run() -> None:
            try:
                made.set_result(call())
            except BaseException as error:
                made.set_exception(error)

        threading.Thread(target=run, name="v4quant-ranks", daemon=True).start()
        with self._lost_errors():
            while True:
                with contextlib.suppress(FutureTimeoutError):
                    return made.result(_MAX_POLL_SECONDS)
                self._group.check()

    @contextlib.contextmanager
    def _lost_errors(self) -> Iterator[None]:
        """Turn what torch.distributed says of a dead process into one clear error.

        Raises:
            LostProcessError: for every error of torch.distributed.
        """
        try:
            yield
        except RuntimeError as error:
            reason = str(error).partition("\n")[0][:200]
            raise LostProcessError(f"lost another process of this job: {reason}", hint=LOST_HINT) from error


class _ProcessesGroup(Group):
    """Processes that compute something together."""

    def __init__(self, processes: ProcessRanks, handle: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._processes = processes
        self._handle = handle

    def gather(self, x: torch.Tensor, take: Take) -> torch.Tensor:
        own = x.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        flat = [part.view(-1).view(torch.uint8) for part in parts]  # bytes, whatever the backend knows of dtypes
        sent = own.view(-1).view(torch.uint8)
        self._processes.wait(lambda: distributed.all_gather(flat, sent, group=self._handle, async_op=True))
        return take(parts)


def require_processes(grid: Grid, size: int) -> None:
    """Refuse a number of processes that is not that of the ranks.

    Raises:
        UsageError: if it is not.
    """
    if size != grid.ranks:
        raise UsageError(
            f"{size:,} processes were started for a checkpoint of {grid.ranks:,} ranks ({grid}), expected one a rank",
            hint=f"Start it with: torchrun --nproc-per-node {grid.ranks} -m v4quant ... Without it all ranks run in "
            "one process.",
        )


def require_same_source(sharded: Sharded, group: ProcessGroup) -> None:
    """Refuse processes that have opened different checkpoints, on machines that do not share a folder.

    Raises:
        CheckpointError: in the first process, if there are any.
    """
    for rank, source in enumerate(group.gather(sharded.source_id())):
        if source != sharded.source_id():
            raise CheckpointError(
                f"{sharded.where}: process {rank} finds another sharded checkpoint there than process 0",
                hint="Give all processes the same folder, or copies of it.",
            )


def _bytes_of(message: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(message, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def _message_of(data: torch.Tensor) -> Any:
    return pickle.loads(data.numpy().data)
