"""Assertions that say where two things differ: bitwise equality of arrays, equality of checkpoint folders."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def assert_bitwise_equal(actual: npt.NDArray[Any] | bytes, expected: npt.NDArray[Any] | bytes) -> None:
    """Compare dtype, shape and every bit; 0 and -0 differ, equal NaN patterns do not.

    Args:
        actual: array or bytes.
        expected: array or bytes.

    Raises:
        AssertionError: with the number of differing elements, the first one's coordinate, and both values in hex.
    """
    found, wanted = _as_array(actual), _as_array(expected)
    assert found.dtype == wanted.dtype, f"dtype is {found.dtype}, expected {wanted.dtype}"
    assert found.shape == wanted.shape, f"shape is {list(found.shape)}, expected {list(wanted.shape)}"
    differs = (_element_bytes(found) != _element_bytes(wanted)).any(axis=-1)
    if differs.any():
        first = int(np.flatnonzero(differs)[0])
        coordinate = [int(i) for i in np.unravel_index(first, found.shape)]
        raise AssertionError(
            f"{np.count_nonzero(differs):,} of {differs.size:,} elements differ, first at {coordinate}: "
            f"{_show(found, first)}, expected {_show(wanted, first)}"
        )


def assert_same_checkpoint(actual: Path, expected: Path) -> None:
    """Compare two folders: the same relative paths, and the same bytes in every file.

    Args:
        actual: folder.
        expected: folder.

    Raises:
        AssertionError: naming the files that only one folder has, or those that differ.
    """
    found, wanted = _file_hashes(actual), _file_hashes(expected)
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    assert not missing and not extra, f"{actual} lacks {missing} and has {extra} besides, compared with {expected}"
    differing = sorted(name for name in wanted if found[name] != wanted[name])
    assert not differing, f"these files differ between {actual} and {expected}: {differing}"


def _as_array(data: npt.NDArray[Any] | bytes) -> npt.NDArray[Any]:
    return np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.asarray(data)


def _element_bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The elements one after another: uint8 [elements, bytes an element]."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).reshape(flat.size, array.dtype.itemsize)


def _show(array: npt.NDArray[Any], position: int) -> str:
    """One element as a number and as its bits, most significant byte first."""
    bits = _element_bytes(array)[position][::-1].tobytes().hex()
    return f"{array.reshape(-1)[position]} (0x{bits})"


def _file_hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
