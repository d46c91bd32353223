"""Run one command and tell its wall time and its peak resident memory, its alone.

A child begins with its parent's size: until it executes the command it runs in the parent's memory, and the kernel
counts that. So scripts that use this import nothing large themselves.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

# ru_maxrss counts KiB, except on macOS.
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Child:
    """A command that ended well.

    Attributes:
        seconds: wall time from start to exit.
        peak_bytes: peak resident memory.
        stdout: what it printed.
    """

    seconds: float
    peak_bytes: int
    stdout: str


def run(command: Sequence[str]) -> Child:
    """Run a command to its end; exits with what it said if it fails."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        if process.returncode != 0:
            stderr.seek(0)
            sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{stderr.read()}")
        return Child(seconds, usage.ru_maxrss * _MAXRSS_BYTES, stdout.read())


def v4quant(*arguments: object) -> Child:
    """Run the command line of the v4quant that this Python has."""
    return run([sys.executable, "-m", "v4quant", *map(str, arguments)])
