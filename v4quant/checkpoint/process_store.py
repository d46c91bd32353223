"""Where the processes of one job leave each other messages: the key-value store of torch.distributed, in JSON.

torchrun runs the store for its processes; without torchrun the process of rank 0 does. Either may still hold what an
earlier attempt of the same job left, so the processes first agree on a token that goes before every name.
"""

import contextlib
import datetime
import json
import os
import secrets
import time
from collections.abc import Iterator
from typing import Any, Protocol

from v4quant.checkpoint.process_environment import ProcessEnvironment
from v4quant.errors import UsageError, V4QuantError

# Time for all processes to start; a cold Python on a shared folder takes a while to import torch.
START_SECONDS = 300.0
POLL_SECONDS = 0.05
LOST_HINT = "Run the same command again; finished work is kept."


class KeyValueStore(Protocol):
    """What is used of torch.distributed's Store."""

    def set(self, key: str, value: str) -> None:
        """Leave a value."""

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        """Leave a value if there is the expected one, or none and "" is expected; returns the one that stands."""

    def check(self, keys: list[str]) -> bool:
        """True if all of these have a value."""

    def get(self, key: str) -> bytes:
        """A value; waits for one that is not there."""

    def delete_key(self, key: str) -> bool:
        """Remove a value."""


class LostProcessError(V4QuantError):
    """Another process of the job died or cannot be reached; finished work is kept and the same command continues it."""

    exit_code = 4


class JobStore:
    """The messages of one job.

    Every method raises LostProcessError if the store cannot be reached. Safe from any thread.

    Attributes:
        rank, size: of this process and its job.
        token: random text that all processes share and no other job, or earlier attempt at this one, has.
    """

    def __init__(self, rank: int, size: int, store: KeyValueStore) -> None:
        """Meet the other processes.

        Args:
            store: reachable by all of them.

        Raises:
            LostProcessError: if they do not come within START_SECONDS.
        """
        self.rank = rank
        self.size = size
        self.token = ""
        self._store = store
        self._is_lost = False
        with self._store_errors():
            if rank == 0:
                self._welcome_all()
            else:
                self._join()

    def put(self, topic: str, value: Any) -> None:
        """Leave a JSON value."""
        with self._store_errors():
            self._store.set(self._key(topic), json.dumps(value))

    def put_first(self, topic: str, value: Any) -> Any:
        """Leave a JSON value unless there is one already; returns the one that stands."""
        with self._store_errors():
            return json.loads(self._store.compare_set(self._key(topic), "", json.dumps(value)))

    def has(self, *topics: str) -> bool:
        """True if all of these have a value."""
        with self._store_errors():
            return self._store.check([self._key(topic) for topic in topics])

    def get(self, topic: str) -> Any:
        """A value that is there."""
        with self._store_errors():
            return json.loads(self._store.get(self._key(topic)))

    def forget(self, topic: str) -> None:
        """Remove a value that nobody needs any more."""
        with self._store_errors():
            self._store.delete_key(self._key(topic))

    @contextlib.contextmanager
    def _store_errors(self) -> Iterator[None]:
        """Turn what the store says into one clear error; a store that was lost is not asked again.

        Raises:
            LostProcessError: for every error of torch.distributed, and for a value that is no JSON.
        """
        if self._is_lost:
            raise _unreachable("the connection was lost")
        try:
            yield
        except (RuntimeError, ValueError) as error:  # a ValueError: something else than v4quant writes there
            self._is_lost = True
            raise _unreachable(_first_line(error)) from error

    def part(self, name: str) -> Any:
        """A part of the store under a name of its own: a torch.distributed.Store, in which collectives can meet.

        It has a connection of its own: on the job's, whoever waits for a value would keep heartbeats back.
        """
        from torch.distributed.distributed_c10d import PrefixStore, Store

        assert isinstance(self._store, Store)
        with self._store_errors():
            connection = self._store.clone()  # type: ignore[attr-defined]  # PyTorch's stubs lack it
        return PrefixStore(self._key(name), connection)

    def _key(self, topic: str) -> str:
        return f"v4quant/{self.token}/{topic}"

    def _welcome_all(self) -> None:
        """Answer the number that each process shows with the token, until all of them have read it."""
        self.token = secrets.token_hex(8)
        waiting, deadline = list(range(1, self.size)), time.monotonic() + START_SECONDS
        while waiting:
            for rank in waiting:
                if self._store.check([f"v4quant/join/{rank}"]):
                    number = self._store.get(f"v4quant/join/{rank}").decode()
                    self._store.set(f"v4quant/welcome/{rank}", f"{number} {self.token}")
            waiting = [rank for rank in waiting if not self._store.check([self._key(f"here/{rank}")])]
            _wait_until(deadline, f"{len(waiting)} of {self.size} processes")

    def _join(self) -> None:
        """Show a number that was made up just now, so that an answer to an earlier attempt is not taken for one."""
        number, deadline = secrets.token_hex(8), time.monotonic() + START_SECONDS
        self._store.set(f"v4quant/join/{self.rank}", number)
        while not self.token:
            _wait_until(deadline, "process 0")
            if self._store.check([f"v4quant/welcome/{self.rank}"]):
                answered, _, token = self._store.get(f"v4quant/welcome/{self.rank}").decode().partition(" ")
                self.token = token if answered == number else ""
        self._store.set(self._key(f"here/{self.rank}"), "")


def connect(environment: ProcessEnvironment) -> JobStore:
    """Reach the store that MASTER_ADDR and MASTER_PORT name, and meet the other processes.

    Raises:
        UsageError: if PyTorch is not installed.
        LostProcessError: if the store cannot be reached, or the others do not come within START_SECONDS.
    """
    # What goes wrong is said below, in one line; torch would add a stack of its C++ frames for each attempt.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from torch.distributed.rendezvous import rendezvous
    except ImportError as error:
        raise UsageError("several processes need PyTorch, which is not installed", hint="pip install torch") from error

    timeout = datetime.timedelta(seconds=START_SECONDS)
    try:
        store, rank, size = next(rendezvous("env://", environment.rank, environment.size, timeout=timeout))
    except RuntimeError as error:
        raise _unreachable(_first_line(error)) from error
    return JobStore(rank, size, store)


def _unreachable(reason: str) -> LostProcessError:
    return LostProcessError(f"cannot reach the other processes of this job: {reason}", hint=LOST_HINT)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _wait_until(deadline: float, for_whom: str) -> None:
    """Wait a moment.

    Raises:
        LostProcessError: after the deadline.
    """
    if time.monotonic() > deadline:
        raise LostProcessError(
            f"waited {START_SECONDS:.0f} seconds for {for_whom} of this job to start", hint="Start them all at once."
        )
    time.sleep(POLL_SECONDS)
