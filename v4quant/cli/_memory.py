"""How much memory a command took."""

import resource
import sys

# ru_maxrss counts KiB, except on macOS.
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


def peak_memory_bytes() -> int:
    """The most that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES
