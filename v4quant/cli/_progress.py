"""Progress bars in bytes or layers on stderr; silent when stderr is not a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Advance = Callable[[int, str], None]


@contextmanager
def byte_progress(total: int, label: str, done: int = 0, *, silent: bool = False) -> Iterator[Advance]:
    """Show how many of `total` bytes are done, at which rate, and how long the rest takes.

    Args:
        total: bytes of the whole job.
        label: what is being done, shown in front.
        done: bytes that an earlier, interrupted run already did.
        silent: show nothing, as where stderr is no terminal.

    Yields:
        advance(bytes, item): counts bytes and shows the item being worked on; safe from any thread.
    """
    with tqdm(
        total=total,
        initial=done,
        desc=label,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        disable=silent or not sys.stderr.isatty(),
        dynamic_ncols=True,
        mininterval=0.2,
    ) as bar:

        def advance(count: int, item: str) -> None:
            bar.set_postfix_str(item, refresh=False)
            bar.update(count)

        yield advance


@contextmanager
def layer_progress(total: int, label: str, unit: str = "layer") -> Iterator[Callable[[str], None]]:
    """Show how many of `total` layers, or other units, are done; silent when stderr is not a terminal.

    Yields:
        done(item): counts one, and shows which it was.
    """
    with tqdm(
        total=total,
        desc=label,
        unit=unit,
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
    ) as bar:

        def done(item: str) -> None:
            bar.set_postfix_str(item, refresh=False)
            bar.update(1)

        yield done
