"""safetensors headers, read as hostile input and written as the released files have them.

    file    8 bytes N, little-endian | N bytes of JSON | tensor data
    JSON    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}, offsets from the data's start

The project reads headers itself: the safetensors library refuses some of V4's dtypes in places, and every doubt about
a file should be a sentence that names it. Source of the layout: the safetensors format description; the limits are
tighter than the library's. Header style of the releases: no spaces, no `__metadata__`, sorted by dtype, then by name.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from v4quant import strict_json
from v4quant.dtypes import DTYPE_BITS, DTYPE_RANK, payload_bytes
from v4quant.errors import CheckpointError

LENGTH_BYTES = 8
# The largest released header has 0.3 MB; one file with all 150,000 tensors of Pro-0813 would have 18 MB.
MAX_HEADER_BYTES = 32 * 2**20
MAX_DIMENSIONS = 8
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_HINT_DAMAGED = "The file is damaged or incomplete; download or export it again."


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a stored tensor lies.

    Attributes:
        name: its name.
        dtype: dtype in the header, a key of DTYPE_BITS.
        shape: shape in the header: the storage shape.
        file: file name within the checkpoint.
        start, stop: byte range in that file, counted from the file's first byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.stop - self.start


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, file: str, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[TensorEntry]]:
    """Write the header of a file in the style of the releases.

    Args:
        tensors: name, dtype and header shape of each.
        file: file name, for the entries.
        metadata: text for `__metadata__`, which files of weights do not have.

    Returns:
        The file's first bytes up to the data, and the entries in file order.
    """
    ordered = sorted(tensors, key=lambda tensor: (DTYPE_RANK[tensor[1]], tensor[0]))
    fields: dict[str, dict[str, Any]] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in ordered:
        stop = offset + payload_bytes(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    entries = [
        TensorEntry(name, dtype, shape, file, *(len(header) + offset for offset in fields[name]["data_offsets"]))
        for name, dtype, shape in ordered
    ]
    return header, entries


def read_header(file: str, file_bytes: int, read: Callable[[int, int], bytes]) -> tuple[bytes, dict[str, TensorEntry]]:
    """Read and check the header of a file.

    Args:
        file: file name, for entries and errors.
        file_bytes: size of the file.
        read: read(start, stop) gives that byte range.

    Returns:
        The header's JSON bytes, and the entries by name in header order.

    Raises:
        CheckpointError: if the header is no such JSON, an entry lies, or data overlaps, is missing or belongs to none.
    """
    if file_bytes < LENGTH_BYTES:
        raise _damaged(file, f"has {file_bytes} bytes, expected a safetensors file")
    (length,) = struct.unpack("<Q", read(0, LENGTH_BYTES))
    if length > MAX_HEADER_BYTES or LENGTH_BYTES + length > file_bytes:
        raise _damaged(
            file,
            f"claims a header of {length:,} bytes, expected at most {MAX_HEADER_BYTES:,} within {file_bytes:,} bytes "
            "of file",
        )
    text = read(LENGTH_BYTES, LENGTH_BYTES + length)
    try:
        parsed = strict_json.parse(text)
    except ValueError as error:
        raise _damaged(file, f"header is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise _damaged(file, "header is no JSON object")
    _check_metadata(file, parsed.pop("__metadata__", {}))
    data_start = LENGTH_BYTES + length
    entries = {name: _entry(file, name, fields, data_start) for name, fields in parsed.items()}
    _check_coverage(file, entries.values(), data_start, file_bytes)
    return text, entries


def _damaged(file: str, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: {what}", hint=_HINT_DAMAGED)


def _check_metadata(file: str, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "__metadata__ is no object of strings")


def _entry(file: str, name: str, fields: object, data_start: int) -> TensorEntry:
    """Check one entry: kinds, known dtype, and a size that its dtype and shape give."""
    who = f"{name[:200]!r}"
    if not isinstance(fields, dict) or fields.keys() != _ENTRY_KEYS:
        raise _damaged(file, f"{who} has no dtype, shape and data_offsets, or more than these")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _damaged(file, f"{who} has dtype {str(dtype)[:40]!r}, expected one of {', '.join(DTYPE_BITS)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(file, f"{who} has shape {str(shape)[:80]}, expected up to {MAX_DIMENSIONS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(file, f"{who} has data_offsets {str(offsets)[:80]}, expected [begin, end]")
    begin, end = offsets
    try:
        expected = payload_bytes(dtype, shape)
    except ValueError as error:
        raise _damaged(file, f"{who}: {error}") from None
    if end - begin != expected:
        raise _damaged(file, f"{who} is {dtype} {shape}, which takes {expected:,} bytes, but has {end - begin:,}")
    return TensorEntry(name, dtype, tuple(shape), file, data_start + begin, data_start + end)


def _are_sizes(value: object) -> bool:
    # type() rather than isinstance(): true and false are no sizes.
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_coverage(file: str, entries: Iterable[TensorEntry], data_start: int, file_bytes: int) -> None:
    """Check that every byte of data belongs to exactly one tensor, and that all of it is there."""
    end, before = data_start, ""
    for entry in _by_place(entries):
        if entry.start < end:
            raise _damaged(file, f"{entry.name[:200]!r} overlaps {before[:200]!r}")
        if entry.start > end:
            raise _damaged(file, f"{entry.start - end:,} bytes before {entry.name[:200]!r} belong to no tensor")
        end, before = entry.stop, entry.name
    if end > file_bytes:
        raise _damaged(file, f"is truncated: has {file_bytes:,} bytes, its header promises {end:,}")
    if end < file_bytes:
        raise _damaged(file, f"has {file_bytes - end:,} bytes after its last tensor")


def _by_place(entries: Iterable[TensorEntry]) -> Iterator[TensorEntry]:
    return iter(sorted(entries, key=lambda entry: (entry.start, entry.stop)))
