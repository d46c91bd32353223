"""Run v4quant command lines that a signal strikes at a chosen moment: before, after or in the middle of a system call.

A program: its arguments are a command line that it runs first, which loads all that is loaded late. Then each line on
stdin is a JSON job {"argv", "signal", "moment", "stderr"}, and each line on stdout its outcome {"exit", "moments"}.
"network": true in a job puts moments around every HTTP request as well.

There are three moments for each call that changes the disk, counted from 0 over all threads; -1 lets the run end by
itself, and "moments" says how many there were. Each job is a fork: a process that SIGKILL ends has no chance to tidy
up, however it was started.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from v4quant.cli.main import main

STRUCK = ("open", "mkdir", "pwrite", "posix_fallocate", "fsync", "replace", "unlink")


class Moments:
    """Counts moments, and sends the signal to this process when its moment has come."""

    def __init__(self, signal: int, moment: int) -> None:
        self.passed = 0
        self._signal = signal
        self._moment = moment
        self._lock = threading.Lock()

    def is_now(self) -> bool:
        with self._lock:
            self.passed += 1
            return self.passed - 1 == self._moment

    def strike(self) -> None:
        if self.is_now():
            os.kill(os.getpid(), self._signal)

    def watch(self, name: str, owner: Any = os) -> None:
        """Put moments before, in the middle of, and after every call of this function of `os`, or of a class."""
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.strike()
            if self.is_now():
                if name == "pwrite":
                    descriptor, data, offset = args
                    original(descriptor, data[: len(data) // 2], offset)
                os.kill(os.getpid(), self._signal)
            result = original(*args, **kwargs)
            self.strike()
            return result

        setattr(owner, name, watched)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Carry out one job in this process."""
    with Path(os.devnull).open("w") as sys.stdout, Path(job["stderr"]).open("w") as sys.stderr:
        moments = Moments(job["signal"], job["moment"])
        for name in STRUCK:
            moments.watch(name)
        if job.get("network"):
            import httpx2

            moments.watch("send", httpx2.Client)
        return {"exit": main(job["argv"]), "moments": moments.passed}


def serve() -> None:
    """Fork for each job and report how it ended."""
    for line in sys.stdin:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            outcome = run(json.loads(line))
            os.write(write_end, json.dumps(outcome).encode())
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as answer:
            outcome_text = answer.read()
        _, status = os.waitpid(pid, 0)
        print(outcome_text or json.dumps({"exit": os.waitstatus_to_exitcode(status), "moments": 0}), flush=True)


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        main(sys.argv[1:])
    serve()
