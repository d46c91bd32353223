"""Safetensors files that hold no weights: token ids to run, and the outputs of a run."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from v4quant import strict_json
from v4quant.checkpoint.header import TensorEntry, build_header, read_header
from v4quant.checkpoint.output import PARTIAL_SUFFIX, ShardFile
from v4quant.errors import CheckpointError, UsageError

_DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
}


class TensorFile:
    """A safetensors file to read from; its header is checked as that of a checkpoint.

    Attributes:
        path: the file.
        tensors: its entries by name.
        metadata: text from its header.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            UsageError: if there is no such file.
            CheckpointError: if it is no sound safetensors file.
        """
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise UsageError(f"{path}: {what}, expected a safetensors file", hint="Check the path.")
        self.path = path
        size = path.stat().st_size
        text, self.tensors = read_header(str(path), size, self._read)
        self.metadata: dict[str, str] = strict_json.parse(text).get("__metadata__", {})

    def read(self, name: str, dtypes: Iterable[torch.dtype]) -> torch.Tensor:
        """A tensor of one of these dtypes.

        Raises:
            CheckpointError: if it is missing or of another dtype.
        """
        entry = self.tensors.get(name)
        wanted = [key for key, dtype in _DTYPES.items() if dtype in set(dtypes)]
        if entry is None:
            held = ", ".join(list(self.tensors)[:8]) or "nothing"
            raise CheckpointError(f"{self.path}: has no tensor {name}, but {held}")
        if entry.dtype not in wanted:
            raise CheckpointError(f"{self.path}: {name} is {entry.dtype}, expected {' or '.join(wanted)}")
        buffer = bytearray(self._read(entry.start, entry.stop))
        if not buffer:
            return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        return torch.frombuffer(buffer, dtype=_DTYPES[entry.dtype]).reshape(entry.shape)

    def columns(self, name: str, first: int, last: int) -> torch.Tensor:
        """Columns [first, last) of a matrix in the file, in its dtype: [rows, last - first].

        Raises:
            CheckpointError: if they cannot be read.
        """
        entry = self.tensors[name]
        rows, width = entry.shape
        size = entry.bytes // (rows * width)
        out = bytearray(rows * (last - first) * size)
        length = (last - first) * size
        for row in range(rows):
            start = entry.start + (row * width + first) * size
            out[row * length : (row + 1) * length] = self._read(start, start + length)
        return torch.frombuffer(out, dtype=_DTYPES[entry.dtype]).reshape(rows, last - first)

    def _read(self, start: int, stop: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot read: {error.strerror or error}",
                hint="Check the disk and the file's permissions.",
            ) from error
        if len(data) < stop - start:
            raise CheckpointError(f"{self.path}: is shorter than before", hint="Leave it alone while it is read.")
        return data


class TensorWriter:
    """A safetensors file whose tensors are known beforehand and written as they come; whole only after `finish`."""

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        """Create it at its full size.

        Args:
            path: the file; until `finish` a partial file of this process stands beside it.
            tensors: header dtype and shape of each.
            metadata: text for its header.

        Raises:
            OutputError: if the disk refuses.
        """
        described = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
        header, entries = build_header(described, file=path.name, metadata=metadata)
        self._entries: dict[str, TensorEntry] = {entry.name: entry for entry in entries}
        partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")  # another run may write the same file
        self._file = ShardFile(path, header, max(entry.stop for entry in entries), partial)

    def write(self, name: str, rows: torch.Tensor, first_row: int = 0) -> None:
        """Write rows of a tensor, in its dtype, from a row on.

        Raises:
            OutputError: if the disk refuses.
        """
        entry = self._entries[name]
        assert rows.dtype == _DTYPES[entry.dtype] and tuple(rows.shape[1:]) == entry.shape[1:], name
        if rows.numel():
            data = rows.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            self._file.write(data, entry.start + first_row * (entry.bytes // entry.shape[0]))

    def finish(self) -> None:
        """Sync and give the file its name.

        Raises:
            OutputError: if the disk refuses.
        """
        self._file.finish()

    def abandon(self) -> None:
        """Remove the partial file."""
        self._file.abandon()
