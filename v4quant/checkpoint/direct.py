"""Large reads and writes past the page cache (O_DIRECT), with the alignment that it asks for hidden inside.

A conversion touches every byte once, so caching it only evicts what other programs need and costs a copy and a page
allocation for each 4 KiB; on virtual machines that allocation is slower than the disk. Direct I/O wants file offset,
length and memory address in multiples of a block: whole blocks go through an aligned staging buffer of each thread, the
rest at both ends goes through the page cache. A file system without direct I/O gets ordinary reads and writes.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import threading

import numpy as np
import numpy.typing as npt

# A multiple of every logical block size in use.
BLOCK_BYTES = 4096
STAGING_BYTES = 2 * 2**20
# What a file system says where direct I/O, or reading without waiting, is not to be had.
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)

Bytes = npt.NDArray[np.uint8]


class DirectFile:
    """A second, direct descriptor of a file that is open already; without one where there is no direct I/O.

    Args:
        path: the file.
        descriptor: the ordinary descriptor, for what is not aligned; stays the caller's.
        flags: os.O_RDONLY or os.O_WRONLY.
    """

    def __init__(self, path: str, descriptor: int, flags: int) -> None:
        self._descriptor = descriptor
        self._direct: int | None = None
        with contextlib.suppress(OSError):
            self._direct = os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT)

    def close(self) -> None:
        """Close the direct descriptor; may be called again."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def read_into(self, start: int, buffer: Bytes) -> int:
        """Fill a buffer from byte `start` on, past the page cache unless it holds these bytes already.

        Returns:
            Bytes read; less than the buffer at the end of the file only.

        Raises:
            OSError: from the operating system.
        """
        done = self._read_cached(start, buffer)
        while done < buffer.size:
            count = self._read_once(start + done, buffer[done:])
            if count == 0:
                break
            done += count
        return done

    def _read_cached(self, start: int, buffer: Bytes) -> int:
        """Take what the page cache holds, without waiting for the disk.

        Only what it is known to hold is asked for: a read that finds something missing makes Linux read ahead, which
        would fetch everything a second time, beside our own direct reads.
        """
        held = _count_cached(self._descriptor, start, buffer.size)
        try:
            return os.preadv(self._descriptor, [buffer[:held].data], start, os.RWF_NOWAIT) if held else 0
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return 0
            raise

    def _read_once(self, start: int, buffer: Bytes) -> int:
        if self._direct is None:
            return os.preadv(self._descriptor, [buffer.data], start)
        skipped = start % BLOCK_BYTES
        wanted = min(-(-(skipped + buffer.size) // BLOCK_BYTES) * BLOCK_BYTES, STAGING_BYTES)
        staging = _staging.buffer[:wanted]
        try:
            found = os.preadv(self._direct, [staging.data], start - skipped) - skipped
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self.close()
            return self._read_once(start, buffer)
        count = min(max(found, 0), buffer.size)
        np.copyto(buffer[:count], staging[skipped : skipped + count])
        return count

    def write(self, data: Bytes, start: int) -> None:
        """Write all of the data to byte `start` on; whole blocks past the page cache.

        Raises:
            OSError: from the operating system.
        """
        done = min(-start % BLOCK_BYTES, data.size) if self._direct is not None else 0
        _write_all(self._descriptor, data[:done], start)
        while self._direct is not None and data.size - done >= BLOCK_BYTES:
            count = min((data.size - done) // BLOCK_BYTES * BLOCK_BYTES, STAGING_BYTES)
            staging = _staging.buffer[:count]
            np.copyto(staging, data[done : done + count])
            try:
                _write_all(self._direct, staging, start + done)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self.close()
                break
            done += count
        _write_all(self._descriptor, data[done:], start + done)


def _count_cached(descriptor: int, start: int, size: int) -> int:
    """How many bytes from `start` on the page cache holds without a gap; all of them where the system does not say.

    Nothing is read: these pages of the file are mapped for a moment, but not touched.
    """
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    length = min(start + size, os.fstat(descriptor).st_size) - first
    if length <= 0:
        return size
    pages = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
    try:
        with mmap.mmap(descriptor, length, prot=mmap.PROT_READ, offset=first) as mapped:
            address = np.frombuffer(mapped, np.uint8).ctypes.data
            if _mincore(address, length, pages.ctypes.data) != 0:
                return size
    except (AttributeError, OSError, ValueError):  # no such call, or a file that cannot be mapped
        return size
    missing = np.flatnonzero(pages & 1 == 0)
    return max(first + int(missing[0]) * mmap.PAGESIZE - start, 0) if missing.size else size


def _mincore(address: int, length: int, pages: int) -> int:
    """The system call: bit 0 of each byte at `pages` says whether that page is in memory."""
    call = ctypes.CDLL(None).mincore
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return int(call(address, length, pages))


def _write_all(descriptor: int, data: Bytes, start: int) -> None:
    done = 0
    while done < data.size:
        done += os.pwrite(descriptor, data[done:].data, start + done)


class _Staging(threading.local):
    """A buffer of each thread that begins at a block boundary."""

    def __init__(self) -> None:
        memory = np.empty(STAGING_BYTES + BLOCK_BYTES, np.uint8)
        self.buffer = memory[-memory.ctypes.data % BLOCK_BYTES :][:STAGING_BYTES]


_staging = _Staging()
