"""How kernels are compiled: by numba, without the GIL, cached on disk where there is a place to write.

numba throws cached machine code away when the file of the kernel changes, but not when a module does that the kernel is
built on. So every module with kernels carries a line `# built on HASH`, the hash of those modules; a test compares it,
prints the right one, and whoever changes such a module pastes it.
"""

from collections.abc import Callable
from typing import Any

import numba


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on first call; the machine code is cached beside the module, or in the user's cache folder."""
    try:
        return numba.njit(function, nogil=True, cache=True, error_model="numpy")
    except RuntimeError:  # numba found no folder that it may write: compile in every process
        return numba.njit(function, nogil=True, error_model="numpy")
