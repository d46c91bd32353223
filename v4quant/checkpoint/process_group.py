"""Several processes that do one job together: who is who, small messages, and how all of them end when one does.

torchrun starts the processes and tells each its place (process_environment.py); they talk through a key-value store
(process_store.py) rather than by collectives, because they meet hours apart: a collective notices a dead process only
once it is entered, has one timeout for waiting and for dying, and needs a connection between every two hosts. Here each
process shows a heartbeat, so a dead one is noticed within LOST_SECONDS however long the work takes, and one that fails
stops the others at their next step.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from v4quant.checkpoint.process_environment import ProcessEnvironment
from v4quant.checkpoint.process_store import LOST_HINT, POLL_SECONDS, JobStore, LostProcessError, connect
from v4quant.errors import InterruptedRunError, V4QuantError

Advance = Callable[[int, str], None]
BEAT_SECONDS = 1.0
LOST_SECONDS = 60.0
# Time for the others to stop after one has failed: they may be syncing a file of several GB.
SETTLE_SECONDS = 30.0


class EndedElsewhereError(V4QuantError):
    """Another process of the job has failed and says why; this one ends with the same exit code and without a word."""

    def __init__(self, rank: int, exit_code: int) -> None:
        super().__init__(f"process {rank} of this job has failed")
        self.exit_code = exit_code


class ProcessGroup:
    """The processes of one job, seen from one of them; a context manager.

    A group of one has no store, no thread and no cost. `barrier`, `gather`, `broadcast`, `receive` and `check` raise
    EndedElsewhereError if another process has failed, and LostProcessError if one has died or cannot be reached.

    Attributes:
        rank: number of this process, from 0.
        size: how many processes there are.
    """

    def __init__(self, store: JobStore | None = None) -> None:
        """Use `from_environment`; without a store, a group of this process alone."""
        self.rank = store.rank if store else 0
        self.size = store.size if store else 1
        self._store = store
        self._messages = {"gather": 0, "broadcast": 0}
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._advance: Advance | None = None
        self._trouble: V4QuantError | None = None
        self._is_closed = threading.Event()
        if store is not None:
            self._watcher = threading.Thread(target=self._watch, args=(store,), name="v4quant-heartbeat", daemon=True)
            self._watcher.start()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The group that torchrun has started this process in; a group of one outside torchrun.

        Raises:
            UsageError: if the variables are incomplete or contradict each other.
            LostProcessError: if the other processes do not start.
        """
        found = ProcessEnvironment.read(environ)
        return cls() if found is None or found.size == 1 else cls(connect(found))

    @property
    def is_first(self) -> bool:
        """True in the process that writes what exists once, and speaks for all."""
        return self.rank == 0

    @property
    def token(self) -> str:
        """Random text that all processes share and no other job, or earlier attempt at this one, has; "" for one."""
        return self._store.token if self._store else ""

    def store_part(self, name: str) -> Any:
        """A torch.distributed.Store of this job, in which collectives can meet; of several processes."""
        assert self._store is not None, "a group of one has no store"
        return self._store.part(name)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)
        self.broadcast(None)

    def gather(self, value: Any) -> list[Any]:
        """Give a JSON value to the first process.

        Returns:
            Every process's value, by rank, in the first process; nothing in the others.
        """
        number = self._next("gather")
        if not self.is_first:
            self.send(f"gather/{number}/{self.rank}", value)
            return []
        return [value, *(self._await(f"gather/{number}/{rank}", forget=True) for rank in range(1, self.size))]

    def broadcast(self, value: Any) -> Any:
        """Give the first process's JSON value to all."""
        number = self._next("broadcast")
        if self.is_first:
            self.send(f"broadcast/{number}", value)
            return value
        return self._await(f"broadcast/{number}", forget=False)

    def send(self, topic: str, value: Any) -> None:
        """Leave a JSON value for `receive`, under a name of its own."""
        if self._store is not None:
            self._store.put(topic, value)

    def receive(self, topic: str) -> Any:
        """What was sent under this name, which is then forgotten; None if nothing was yet."""
        self.check()
        if self._store is None or not self._store.has(topic):
            return None
        value = self._store.get(topic)
        self._store.forget(topic)
        return value

    def check(self) -> None:
        """Go on only while all processes do; cheap enough for every step of the work, from any thread."""
        if self._trouble is not None:
            raise self._trouble

    def progress(self, advance: Advance) -> Advance:
        """What to report bytes and file to, from any thread: the first process's `advance` hears of everybody's bytes.

        What is returned raises what `check` raises.
        """
        if self.size == 1:
            return advance
        self._advance = advance if self.is_first else None

        def report(count: int, item: str) -> None:
            self.check()
            if self.is_first:
                advance(count, item)
            else:
                with self._lock:
                    self._done_bytes += count

        return report

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Work that ends in all processes if it fails in one; the first one to fail is the one that says why.

        When this is left with an error, the others have stopped their work too, or had SETTLE_SECONDS to do so.

        Raises:
            EndedElsewhereError: in place of an error that comes after another process's.
        """
        try:
            yield
        except BaseException as error:
            if self._store is None:
                raise
            first = _announce(self._store, error)
            with contextlib.suppress(LostProcessError):
                self._store.put(f"ended/{self.rank}", True)
                if self.is_first:
                    _settle(self._store, [f"ended/{rank}" for rank in range(1, self.size)])
            if first is not None:
                raise first from error
            raise

    def __enter__(self) -> Self:
        """Begin; leave the block when this process has nothing more to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Part from the others."""
        if self._store is None:
            return
        with contextlib.suppress(LostProcessError):
            for part in ("ended", "closed"):
                self._store.put(f"{part}/{self.rank}", True)
            if self.is_first and error is None:
                # It may hold the store, so it goes last.
                _settle(self._store, [f"closed/{rank}" for rank in range(1, self.size)])
            elif not self.is_first and error is not None:
                # torchrun ends all processes once one exits with an error: let the first one tidy up before.
                _settle(self._store, ["closed/0"])
        self._is_closed.set()
        self._watcher.join()

    def _next(self, kind: str) -> int:
        self._messages[kind] += 1
        return self._messages[kind]

    def _await(self, topic: str, *, forget: bool) -> Any:
        """Wait for a value for as long as all processes live."""
        assert self._store is not None
        while not self._store.has(topic):
            self.check()
            time.sleep(POLL_SECONDS)
        value = self._store.get(topic)
        if forget:
            self._store.forget(topic)
        return value

    def _watch(self, store: JobStore) -> None:
        """Show a heartbeat until closed, and watch: the first process all others, the others the first."""
        seen = dict.fromkeys(range(1, self.size) if self.is_first else [0], _Heartbeat(0, 0, time.monotonic()))
        beat = 0
        while not self._is_closed.wait(BEAT_SECONDS):
            beat += 1
            try:
                _raise_failure(store)
                store.put(f"alive/{self.rank}", [beat, self._done_bytes])
                for rank, last in seen.items():
                    seen[rank] = self._listen(store, rank, last)
            except V4QuantError as error:
                self._trouble = error
                return
            except (TypeError, ValueError):
                self._trouble = LostProcessError("what stands for a heartbeat in the store is none", hint=LOST_HINT)
                return

    def _listen(self, store: JobStore, rank: int, last: "_Heartbeat") -> "_Heartbeat":
        """The newest heartbeat of a process, given the last.

        Raises:
            LostProcessError: if there has been no new one for LOST_SECONDS.
        """
        now = time.monotonic()
        beat, done_bytes = store.get(f"alive/{rank}") if store.has(f"alive/{rank}") else (0, 0)
        if beat == last.beat:
            if now - last.seen > LOST_SECONDS:
                for part in ("ended", "closed"):  # on its behalf, so that nobody waits for that
                    store.put(f"{part}/{rank}", True)
                silence = f"has not been heard of for {LOST_SECONDS:.0f} seconds"
                raise LostProcessError(f"process {rank} of {self.size} {silence}", hint=LOST_HINT)
            return last
        if self._advance is not None and done_bytes > last.done_bytes:
            self._advance(done_bytes - last.done_bytes, "other processes")
        return _Heartbeat(beat, done_bytes, now)


@dataclass(frozen=True)
class _Heartbeat:
    """What was last seen of another process.

    Attributes:
        beat: number of its heartbeat.
        done_bytes: what it had done by then.
        seen: when that was new here, on the monotonic clock.
    """

    beat: int
    done_bytes: int
    seen: float


def _announce(store: JobStore, error: BaseException) -> EndedElsewhereError | None:
    """Tell the others that this process fails; returns the failure of another one that came before."""
    if isinstance(error, EndedElsewhereError):
        return None
    is_interrupt = isinstance(error, KeyboardInterrupt)
    code = error.exit_code if isinstance(error, V4QuantError) else InterruptedRunError.exit_code if is_interrupt else 1
    try:
        rank, exit_code = store.put_first("failed", [store.rank, code])
    except LostProcessError:  # nobody can be told, and the error at hand is what is known
        return None
    return None if rank == store.rank else EndedElsewhereError(rank, exit_code)


def _raise_failure(store: JobStore) -> None:
    """Raise what another process has announced."""
    if store.has("failed"):
        rank, exit_code = store.get("failed")
        if rank != store.rank:
            raise EndedElsewhereError(rank, exit_code)


def _settle(store: JobStore, topics: list[str]) -> None:
    """Wait until these are there, SETTLE_SECONDS at most."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while not store.has(*topics) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
