"""The place of this process among those of its job, as torchrun writes it into the environment.

RANK and WORLD_SIZE say which process of how many this is, LOCAL_RANK which on its machine, MASTER_ADDR and MASTER_PORT
where they meet. Source: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from v4quant.errors import UsageError

MAX_PROCESSES = 4096
_HOST = re.compile(r"[0-9A-Za-z._:%-]{1,253}")
_HINT = "Start it with torchrun, which sets them all, or unset RANK and WORLD_SIZE to work with one process."


@dataclass(frozen=True)
class ProcessEnvironment:
    """A place among the processes of a job.

    Attributes:
        rank: number of this process, from 0.
        size: how many processes there are.
        local_rank: number of this process among those of its machine, from 0.
    """

    rank: int
    size: int
    local_rank: int

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "ProcessEnvironment | None":
        """Read the variables; None where neither RANK nor WORLD_SIZE is set.

        Raises:
            UsageError: if one is missing, no number, or out of range.
        """
        if "RANK" not in environ and "WORLD_SIZE" not in environ:
            return None
        size = _integer(environ, "WORLD_SIZE", 1, MAX_PROCESSES)
        rank = _integer(environ, "RANK", 0, size - 1)
        # Launchers with one process a machine may leave it out.
        local_rank = _integer(environ, "LOCAL_RANK", 0, size - 1) if "LOCAL_RANK" in environ else 0
        if size > 1:
            _integer(environ, "MASTER_PORT", 1, 2**16 - 1)
            if not _HOST.fullmatch(host := environ.get("MASTER_ADDR", "")):
                raise _unexpected("MASTER_ADDR", host, "the name of a host")
        return cls(rank, size, local_rank)


def _integer(environ: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = environ.get(name, "")
    if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise _unexpected(name, text, f"a whole number from {least} to {most}")
    return int(text)


def _unexpected(name: str, found: str, expected: str) -> UsageError:
    what = f"is {found[:80]!r}" if found else "is not set"
    return UsageError(f"environment variable {name} {what}, expected {expected}", hint=_HINT)
