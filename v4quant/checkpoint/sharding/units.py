"""Many files, one a thread, each noted as finished when it is: the loop of `shard` and `merge`."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

from v4quant.checkpoint.stream import Worker
from v4quant.formats.cast import Scratch

Advance = Callable[[int, str], None]
_Result = TypeVar("_Result")


def work_through(
    names: Iterable[str],
    work: Callable[[str, Worker], _Result],
    finish: Callable[[str, _Result], None],
    *,
    workers: int,
    advance: Advance | None,
) -> None:
    """Work on every file; the first error, or a Ctrl-C, ends the others between two pieces.

    Args:
        names: the files.
        work: called in a thread, with what a thread needs.
        finish: called for each file in a thread of its own, one at a time, so that a Ctrl-C cannot cut it short.
        workers: threads.
        advance: told bytes and file.

    Raises:
        Whatever work and finish raise, and KeyboardInterrupt.
    """
    stop, of_thread = threading.Event(), threading.local()

    def run(name: str) -> _Result:
        if not hasattr(of_thread, "scratch"):
            of_thread.scratch = Scratch()

        def report(count: int) -> None:
            if advance is not None:
                advance(count, name)

        worker = Worker(stop, report, of_thread.scratch)
        worker.step(0)
        return work(name, worker)

    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as finisher:
        # A Ctrl-C while a thread starts makes its pool forget it; what this one does must be waited for.
        finisher.submit(lambda: None).result()
        tasks: dict[Future[_Result], str] = {}
        finishing: Future[None] | None = None
        try:
            for name in names:
                tasks[pool.submit(run, name)] = name
            for task in as_completed(tasks):
                result = task.result()
                if finishing is not None:
                    finishing.result()
                finishing = finisher.submit(finish, tasks[task], result)
            if finishing is not None:
                finishing.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
