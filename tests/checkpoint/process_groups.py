"""Several processes of one job, played by threads of this one around a store in memory."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch.distributed

from v4quant.checkpoint.process_group import ProcessGroup
from v4quant.checkpoint.process_store import JobStore, KeyValueStore

_Result = TypeVar("_Result")


def new_store() -> KeyValueStore:
    """A store that threads share."""
    store: KeyValueStore = torch.distributed.HashStore()  # type: ignore[attr-defined]
    return store


class BreakableStore:
    """A store whose host can die."""

    def __init__(self) -> None:
        self._store = new_store()
        self.is_dead = threading.Event()

    def __getattr__(self, name: str) -> Any:
        if self.is_dead.is_set():
            raise RuntimeError("Connection reset by peer")
        return getattr(self._store, name)


def group_of(rank: int, size: int, store: KeyValueStore) -> ProcessGroup:
    """The group as one process sees it."""
    return ProcessGroup(JobStore(rank, size, store))


def in_processes(
    size: int, work: Callable[[ProcessGroup], _Result], store: KeyValueStore | None = None
) -> list[_Result | Exception]:
    """What the work returns or raises in each process, by rank."""
    shared = store or new_store()

    def run(rank: int) -> _Result | Exception:
        try:
            with group_of(rank, size, shared) as group, group.ending_together():
                return work(group)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
