"""Ranks in one process: a thread each, which meet wherever they exchange something.

When one fails, every meeting is called off, so that no other waits for it, and its error is the one that is raised.
"""

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol

import torch

from v4quant.checkpoint.sharding.grid import Grid, Place
from v4quant.model.ranks import Alone, Group, RankLostError, Ranks, Take


class Worker(Protocol):
    """What does a rank's work."""

    def do(self, order: Any) -> Any:
        """Do what is asked; every rank is asked the same."""

    def close(self) -> None:
        """Give back its threads."""


class _Meeting:
    """Where threads exchange tensors: each puts its own down, and takes what it makes of all."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._put: list[torch.Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, x: torch.Tensor, take: Take) -> torch.Tensor:
        self._put[rank] = x
        self._wait()
        taken = take(list(self._put))
        self._wait()  # nobody changes its own before all have taken
        return taken

    def _wait(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise RankLostError("another rank has failed") from None

    def call_off(self) -> None:
        self._barrier.abort()


class _ThreadGroup(Group):
    """Threads of one process."""

    def __init__(self, meeting: _Meeting, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._meeting = meeting

    def gather(self, x: torch.Tensor, take: Take) -> torch.Tensor:
        return self._meeting.exchange(self.rank, x, take)


class VirtualRanks:
    """All ranks of a grid as threads of this process, until `close`."""

    def __init__(self, grid: Grid, worker: Callable[[Ranks], Worker]) -> None:
        """Start them.

        Args:
            worker: makes the worker of a rank; called in its thread.

        Raises:
            Exception: the first that `worker` raises.
        """
        self._meetings: list[_Meeting] = []
        self._orders: list[SimpleQueue[tuple[Any] | None]] = [SimpleQueue() for _ in grid.places]
        self._answers: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        before = torch.get_num_threads()
        cores = max(before // grid.ranks, 1)
        self._threads = [
            threading.Thread(target=self._serve, args=(ranks, worker, cores), name=f"rank {ranks.place.rank}")
            for ranks in self._connected(grid)
        ]
        try:
            for thread in self._threads:
                thread.start()
            self._collect()
        except BaseException:
            self.close(in_order=False)
            raise
        finally:
            torch.set_num_threads(before)  # what threads to come begin with was changed too

    def close(self, *, in_order: bool = True) -> None:
        """End all threads, whether or not the run came to its end in order."""
        del in_order
        self._call_off()
        for orders in self._orders:
            orders.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def call(self, order: Any) -> list[Any]:
        """Ask every rank the same; their answers, in rank order.

        Raises:
            Exception: the first that any of them raises.
        """
        for orders in self._orders:
            orders.put((order,))
        return self._collect()

    def _collect(self) -> list[Any]:
        answers: list[Any] = [None] * len(self._threads)
        failures: list[BaseException] = []
        for _ in answers:
            rank, answer = self._answers.get()
            if isinstance(answer, BaseException):
                failures.append(answer)
            answers[rank] = answer
        if failures:
            raise next((own for own in failures if not isinstance(own, RankLostError)), failures[0])
        return answers

    def _call_off(self) -> None:
        for meeting in self._meetings:
            meeting.call_off()

    def _serve(self, ranks: Ranks, make: Callable[[Ranks], Worker], cores: int) -> None:
        """A rank's thread: do what is asked until the end; every question has an answer, be it an error."""
        rank = ranks.place.rank
        torch.get_num_threads()  # or the thread's first operation sets what holds for all
        torch.set_num_threads(cores)
        worker: Worker | None = None
        order: tuple[Any] | None = None
        try:
            with torch.inference_mode():  # a mode of each thread
                worker = make(ranks)
                self._answers.put((rank, None))
                while order := self._orders[rank].get():
                    self._answers.put((rank, worker.do(*order)))
        except BaseException as error:
            self._call_off()
            self._answers.put((rank, error))
            while self._orders[rank].get():  # a rank that has failed fails whatever it is asked
                self._answers.put((rank, error))
        finally:
            if worker is not None:
                worker.close()

    def _connected(self, grid: Grid) -> list[Ranks]:
        """Every rank with its groups."""
        tensor = {
            key: self._groups(members)
            for key, members in ranks_in_common(grid, lambda own: (own.stage, own.ep_rank)).items()
        }
        stage = {
            key: self._groups(members) for key, members in ranks_in_common(grid, lambda own: (own.stage, 0)).items()
        }
        return [
            Ranks(place, tensor[place.stage, place.ep_rank][place.rank], stage[place.stage, 0][place.rank])
            for place in grid.places
        ]

    def _groups(self, members: Sequence[int]) -> dict[int, Group]:
        """A group of these ranks as each of them sees it."""
        if len(members) == 1:
            return {members[0]: Alone()}
        self._meetings.append(_Meeting(len(members)))
        meeting = self._meetings[-1]
        return {rank: _ThreadGroup(meeting, number, len(members)) for number, rank in enumerate(members)}


def ranks_in_common(grid: Grid, key: Callable[[Place], tuple[int, int]]) -> dict[tuple[int, int], list[int]]:
    """Ranks by what they have in common, each in rank order."""
    found: dict[tuple[int, int], list[int]] = {}
    for place in grid.places:
        found.setdefault(key(place), []).append(place.rank)
    return found
