"""Direct I/O equals plain I/O at every misalignment, asks the system for aligned blocks only, and can do without.

A stand-in for the operating system plays a strict disk on any file system: what it is asked for directly must be
aligned, and it can refuse, fall short or fail when a test wants it to.
"""

import ctypes
import errno
import itertools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from v4quant.checkpoint import direct
from v4quant.checkpoint.direct import BLOCK_BYTES, STAGING_BYTES, Bytes, DirectFile

FILE_BYTES = 2 * STAGING_BYTES + 3 * BLOCK_BYTES + 123
CONTENT: Bytes = np.random.default_rng(7).integers(0, 256, FILE_BYTES, np.uint8)
# Where a block or the staging buffer begins or ends, and one byte beside it.
PLACES = sorted(
    {0, 1, 511, 512, FILE_BYTES - 1}
    | {size + off for size in (BLOCK_BYTES, 2 * BLOCK_BYTES, STAGING_BYTES) for off in (-1, 0, 1)}
)
RANGES = st.tuples(st.integers(0, FILE_BYTES), st.integers(0, FILE_BYTES)).map(sorted) | st.tuples(
    st.sampled_from(PLACES), st.sampled_from(PLACES)
).map(sorted)


class StrictDisk:
    """Takes the place of the calls that direct.py makes, and keeps its descriptors for direct I/O apart.

    Attributes:
        requests: bytes of each direct read or write that was carried out, in order.
        caches: False makes the page cache seem empty.
        refusal: what a direct request is refused with; 0 for not at all.
        granted: direct requests to carry out before the refusals begin.
        most: bytes that one request moves at most.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[int] = []
        self.caches = False
        self.refusal = 0
        self.granted = 0
        self.most = FILE_BYTES
        self._direct: set[int] = set()
        self._open, self._close, self._preadv, self._pwrite = os.open, os.close, os.preadv, os.pwrite
        for name in ("open", "close", "preadv", "pwrite"):
            monkeypatch.setattr(os, name, getattr(self, name))

    def open(self, path: str, flags: int, *more: int) -> int:
        descriptor = self._open(path, flags & ~os.O_DIRECT, *more)
        if flags & os.O_DIRECT:
            self._direct.add(descriptor)
        return descriptor

    def close(self, descriptor: int) -> None:
        self._direct.discard(descriptor)
        self._close(descriptor)

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT and not self.caches:
            raise BlockingIOError(errno.EAGAIN, "not in the page cache")
        (buffer,) = buffers
        self._check(descriptor, buffer, offset)
        return self._preadv(descriptor, [buffer[: self.most]], offset)

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        self._check(descriptor, data, offset)
        return self._pwrite(descriptor, data[: self.most], offset)

    def _check(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        if descriptor not in self._direct:
            return
        if self.refusal and len(self.requests) >= self.granted:
            raise OSError(self.refusal, os.strerror(self.refusal))
        address = np.frombuffer(buffer, np.uint8).ctypes.data
        if any(number % BLOCK_BYTES for number in (address, len(buffer), offset)):
            raise OSError(errno.EINVAL, f"misaligned: {len(buffer)} bytes at {offset}, memory at {address:#x}")
        self.requests.append(len(buffer))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> StrictDisk:
    return StrictDisk(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT.tobytes())
    return tmp_path / "file"


@contextmanager
def opened(path: Path, flags: int) -> Iterator[DirectFile]:
    descriptor = os.open(path, flags)
    file = DirectFile(str(path), descriptor, flags)
    try:
        yield file
    finally:
        file.close()
        os.close(descriptor)


def read(path: Path, start: int, stop: int) -> tuple[Bytes, int]:
    buffer = np.full(stop - start, 0xEE, np.uint8)
    with opened(path, os.O_RDONLY) as file:
        return buffer, file.read_into(start, buffer)


def assert_reads(path: Path, start: int, stop: int) -> None:
    found, count = read(path, start, stop)
    assert count == stop - start
    assert np.array_equal(found, CONTENT[start:stop]), f"[{start}, {stop})"


def assert_writes(path: Path, start: int, stop: int) -> None:
    """Write the complement of what is there; everything around it must stay."""
    path.write_bytes(CONTENT.tobytes())
    with opened(path, os.O_WRONLY) as file:
        file.write(~CONTENT[start:stop], start)
    expected = CONTENT.copy()
    expected[start:stop] ^= 0xFF
    assert np.array_equal(np.frombuffer(path.read_bytes(), np.uint8), expected), f"[{start}, {stop})"


every_range = given(RANGES)
few = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@few
@every_range
def test_any_range_is_read_as_it_is(path: Path, span: list[int]) -> None:
    """On the file system at hand, whatever of it the page cache holds."""
    assert_reads(path, *span)


@few
@every_range
def test_any_range_is_written_and_nothing_around_it(path: Path, span: list[int]) -> None:
    assert_writes(path, *span)


@few
@every_range
def test_a_strict_disk_reads_any_range(disk: StrictDisk, path: Path, span: list[int]) -> None:
    disk.requests.clear()
    assert_reads(path, *span)
    assert bool(disk.requests) == (span[0] < span[1])


@few
@every_range
def test_a_strict_disk_writes_any_range(disk: StrictDisk, path: Path, span: list[int]) -> None:
    """Direct are exactly the whole blocks of the range."""
    disk.requests.clear()
    assert_writes(path, *span)
    first, last = -(-span[0] // BLOCK_BYTES), span[1] // BLOCK_BYTES
    assert sum(disk.requests) == max(0, last - first) * BLOCK_BYTES
    assert max(disk.requests, default=0) <= STAGING_BYTES


def test_a_disk_that_was_dropped_from_the_page_cache(path: Path) -> None:
    """The same on the real disk, as far as the system lets go of the pages."""
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    for start in (0, 1, 4095, STAGING_BYTES + 1):
        assert_reads(path, start, FILE_BYTES - start)


def test_what_the_page_cache_holds_is_taken_from_there(disk: StrictDisk, path: Path) -> None:
    disk.caches = True
    assert_reads(path, 100, FILE_BYTES)
    assert disk.requests == []
    # Half of it is cached: the rest comes from the disk.
    disk.most = STAGING_BYTES
    assert_reads(path, 100, FILE_BYTES)
    assert sum(disk.requests) >= FILE_BYTES - STAGING_BYTES - 100


@pytest.mark.parametrize("start", [0, 1, FILE_BYTES - 5000, FILE_BYTES - 1, FILE_BYTES, FILE_BYTES + 1, 2 * FILE_BYTES])
@pytest.mark.parametrize("caches", [True, False])
def test_the_end_of_the_file_ends_a_read(caches: bool, start: int, disk: StrictDisk, path: Path) -> None:
    disk.caches = caches
    found, count = read(path, start, FILE_BYTES + 10_000 + start)
    assert count == max(0, FILE_BYTES - start)
    assert np.array_equal(found[:count], CONTENT[start:])
    assert (found[count:] == 0xEE).all(), "nothing is made up after the end"


def test_a_new_file_is_written_whole(disk: StrictDisk, tmp_path: Path) -> None:
    """Pieces in any order, as worker threads have them, make one file."""
    target = tmp_path / "new"
    target.touch()
    cuts = [0, 7, 4096, 8191, 300_000, STAGING_BYTES + 11, FILE_BYTES]
    pieces = list(itertools.pairwise(cuts))
    with opened(target, os.O_WRONLY) as file, ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda piece: file.write(CONTENT[slice(*piece)], piece[0]), reversed(pieces)))
    assert target.read_bytes() == CONTENT.tobytes()
    assert disk.requests


def test_threads_do_not_share_a_staging_buffer(disk: StrictDisk, path: Path) -> None:
    starts = [number * 61_001 for number in range(64)]
    with opened(path, os.O_RDONLY) as file, ThreadPoolExecutor(4) as pool:

        def take(start: int) -> bool:
            buffer = np.empty(200_000, np.uint8)
            return file.read_into(start, buffer) == 200_000 and np.array_equal(buffer, CONTENT[start : start + 200_000])

        assert all(pool.map(take, starts))
    assert len(disk.requests) >= len(starts)


# Without direct I/O.

UNSUPPORTED = sorted({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})
SPANS = [(0, FILE_BYTES), (1, FILE_BYTES - 1), (4095, 4 * BLOCK_BYTES + 1), (STAGING_BYTES - 1, FILE_BYTES)]


@pytest.mark.parametrize("check", [assert_reads, assert_writes])
@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOENT, errno.EMFILE])
def test_a_file_system_that_does_not_open_files_so(
    check: Callable[[Path, int, int], None], error: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ = os.open
    refused: list[str] = []

    def refuse(name: str, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            refused.append(name)
            raise OSError(error, os.strerror(error))
        return open_(name, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    for span in SPANS:
        check(path, *span)
    assert refused == [str(path)] * len(SPANS)


@pytest.mark.parametrize("check", [assert_reads, assert_writes])
@pytest.mark.parametrize("error", UNSUPPORTED)
@pytest.mark.parametrize("granted", [0, 1])
def test_a_file_system_that_opens_files_so_and_then_refuses(
    check: Callable[[Path, int, int], None], error: int, granted: int, disk: StrictDisk, path: Path
) -> None:
    disk.refusal, disk.granted = error, granted
    for span in SPANS:
        disk.requests.clear()
        check(path, *span)
        assert len(disk.requests) <= granted, "it was not asked again"


@pytest.mark.parametrize("error", UNSUPPORTED)
def test_a_file_system_that_cannot_read_without_waiting(
    error: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def refuse(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise OSError(error, os.strerror(error))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    for span in SPANS:
        assert_reads(path, *span)


@pytest.mark.parametrize("most", [BLOCK_BYTES + 512, STAGING_BYTES - BLOCK_BYTES])
@pytest.mark.parametrize("span", SPANS)
def test_requests_that_fall_short_are_continued(span: tuple[int, int], most: int, disk: StrictDisk, path: Path) -> None:
    disk.most = most
    assert_reads(path, *span)
    assert_writes(path, *span)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_real_errors_are_not_taken_for_missing_support(error: int, disk: StrictDisk, path: Path) -> None:
    disk.refusal = error
    for action in (lambda: read(path, 0, FILE_BYTES), lambda: assert_writes(path, 0, FILE_BYTES)):
        with pytest.raises(OSError, match=os.strerror(error)) as caught:
            action()
        assert caught.value.errno == error


def test_an_error_of_a_cached_read_is_not_swallowed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read(path, 0, BLOCK_BYTES)


def test_closing_twice_and_going_on_without(disk: StrictDisk, path: Path) -> None:
    buffer = np.empty(FILE_BYTES - 3, np.uint8)
    with opened(path, os.O_RDONLY) as file:
        file.close()
        file.close()
        assert file.read_into(3, buffer) == buffer.size
    assert np.array_equal(buffer, CONTENT[3:])
    assert disk.requests == []


@pytest.mark.usefixtures("disk")
def test_the_strict_disk_is_strict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    memory = (ctypes.c_char * (2 * BLOCK_BYTES))()
    skip = -ctypes.addressof(memory) % BLOCK_BYTES
    view = memoryview(memory).cast("B")
    try:
        assert os.preadv(descriptor, [view[skip : skip + BLOCK_BYTES]], 0) == BLOCK_BYTES
        for start, size, offset in ((skip + 8, BLOCK_BYTES, 0), (skip, 100, 0), (skip, BLOCK_BYTES, 1)):
            with pytest.raises(OSError, match="misaligned"):
                os.preadv(descriptor, [view[start : start + size]], offset)
    finally:
        os.close(descriptor)


def test_only_what_the_page_cache_holds_is_taken_from_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for more would make the system read ahead what is read directly anyway."""
    asked: list[int] = []
    preadv = os.preadv

    def watched(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            asked.append(len(buffers[0]))
        return preadv(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", watched)

    def held(pages: list[int]) -> Callable[[int, int, int], int]:
        def mincore(_address: int, length: int, found: int) -> int:
            count = -(-length // mmap.PAGESIZE)
            ctypes.memmove(found, bytes((pages + [0] * count)[:count]), count)
            return 0

        return mincore

    for pages, start, expected in (([1, 1, 1], 0, 3), ([1, 1], 100, 2), ([0, 1, 1], 5, 0), ([0xFE, 1], 0, 0)):
        asked.clear()
        monkeypatch.setattr(direct, "_mincore", held(pages))
        assert_reads(path, start, 8 * mmap.PAGESIZE)
        assert asked == ([expected * mmap.PAGESIZE - start] if expected else [])


@pytest.mark.parametrize("error", [None, AttributeError, OSError])
def test_a_system_that_does_not_say_what_it_holds(
    path: Path, error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mincore(*_: int) -> int:
        if error is not None:
            raise error
        return -1

    monkeypatch.setattr(direct, "_mincore", mincore)
    assert_reads(path, 3, FILE_BYTES)
