"""Several processes of one job, played by threads of this one around a store in memory."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch.distributed import HashStore, Store

from v4quant.checkpoint.process_group import ProcessGroup
from v4quant.checkpoint.process_store import JobStore

_Result = TypeVar("_Result")


class BreakableStore:
    """A store whose host can die."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_dead = threading.Event()

    def __getattr__(self, name: str) -> object:
        if self.is_dead.is_set():
            raise RuntimeError("Connection reset by peer")
        return getattr(self._store, name)


def group_of(rank: int, size: int, store: object) -> ProcessGroup:
    """The group as one process sees it."""
    return ProcessGroup(JobStore(rank, size, store))  # type: ignore[arg-type]


def in_processes(size: int, work: Callable[[ProcessGroup], _Result], store: object = None) -> list[_Result | Exception]:
    """What the work returns or raises in each process, by rank."""
    shared = store or HashStore()

    def run(rank: int) -> _Result | Exception:
        try:
            with group_of(rank, size, shared) as group, group.ending_together():
                return work(group)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
