"""A copy of a small checkpoint with one fault in it, and with nothing else wrong.

Edits are collected and carried out by `finish`. Files that stay as they are become hard links to the originals, so a
copy costs what changes; a changed file is always a new one under its name, so nothing is written through a link.
Headers and index are rebuilt to fit the edited tensors, unless the index is the fault.
"""

import copy
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from v4quant import strict_json
from v4quant.checkpoint.header import TensorEntry, build_header
from v4quant.checkpoint.index import INDEX_NAME
from v4quant.checkpoint.output import disk_errors
from v4quant.checkpoint.reader import Checkpoint
from v4quant.config import CONFIG_NAME
from v4quant.dtypes import payload_bytes
from v4quant.parity.selftest.reduce import config_bytes

# Header dtype -> torch's, for editing; codes and E8M0 scales are edited as bytes.
_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I8": torch.uint8,
    "F8_E4M3": torch.uint8,
    "F8_E8M0": torch.uint8,
}
_READ_BYTES = 4 * 2**20


@dataclass(frozen=True)
class _Stored:
    """A tensor of the copy: new data, or a tensor of the original."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes | TensorEntry


class Editor:
    """Collects the edits of one copy.

    Attributes:
        checkpoint: the original; nothing in its folder is ever written.
        config: the copy's config.json, parsed, to be changed in place.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Begin without edits.

        Args:
            checkpoint: as reduce_checkpoint writes it: sound, with an index.
        """
        self.checkpoint = checkpoint
        self.config: dict[str, Any] = copy.deepcopy(dict(checkpoint.config_json))
        self._tensors = {
            name: _Stored(entry.file, entry.dtype, entry.shape, entry) for name, entry in checkpoint.tensors.items()
        }
        self._rewritten: set[str] = set()  # shards that hold other tensors than the original's
        self._removed: set[str] = set()
        self._second_names: dict[str, str] = {}
        self._damage: dict[str, Callable[[Path], object]] = {}
        self._index: dict[str, Any] | None = None  # None: rebuilt
        self._index_edits: list[Callable[[dict[str, Any]], object]] = []

    def read(self, name: str) -> torch.Tensor:
        """A copy of a tensor as it stands, edits included: its header's shape; uint8 for codes and E8M0 scales."""
        stored = self._tensors[name]
        return torch.frombuffer(bytearray(self._bytes(stored)), dtype=_DTYPES[stored.dtype]).reshape(stored.shape)

    def write(self, name: str, values: torch.Tensor, dtype: str = "") -> None:
        """Replace a tensor's values, and its shape by theirs.

        Args:
            name: a tensor that is there.
            values: in the dtype that `read` gives for the header dtype.
            dtype: header dtype; the one it has by default.
        """
        old = self._tensors[name]
        new = self._new(name, dtype or old.dtype, values, old.file)
        if (old.dtype, old.shape, self._bytes(old)) != (new.dtype, new.shape, new.data):
            self._tensors[name] = new
            self._rewritten.add(old.file)

    def add(self, name: str, dtype: str, values: torch.Tensor, file: str) -> None:
        """Store a new tensor in a shard; arguments as for `write`."""
        assert name not in self._tensors, f"{name} is there already"
        self._tensors[name] = self._new(name, dtype, values, file)
        self._rewritten.add(file)

    def remove(self, name: str) -> None:
        """Leave a tensor out of its shard and of the index; a shard without tensors is left out, too."""
        self._rewritten.add(self._tensors.pop(name).file)

    def rename(self, name: str, new_name: str) -> None:
        """Store a tensor under another name."""
        assert new_name not in self._tensors, f"{new_name} is there already"
        self._rewritten.add(self._tensors[name].file)
        self._tensors[new_name] = self._tensors.pop(name)

    def remove_file(self, name: str) -> None:
        """Leave a file out, though the index may go on naming it."""
        self._removed.add(name)

    def copy_file(self, name: str, new_name: str) -> None:
        """Put a second copy of a shard beside it, which the index does not name."""
        self._second_names[new_name] = name

    def damage_file(self, name: str, damage: Callable[[Path], object]) -> None:
        """Change a shard's bytes behind the back of its header.

        Args:
            name: a shard.
            damage: given the path of a copy of it that no other folder shares.
        """
        self._damage[name] = damage

    def edit_index(self, edit: Callable[[dict[str, Any]], object]) -> None:
        """Change what the index says, as parsed JSON, after it was rebuilt."""
        self._index_edits.append(edit)

    def leave_index_stale(self) -> None:
        """Keep the original's index, whatever the shards will hold."""
        self._index = self._original_index()

    def finish(self, out: Path) -> list[str]:
        """Write the copy.

        Args:
            out: a folder that does not exist yet.

        Returns:
            Names of the files that differ from the original's, are new or are missing, sorted; none where the edits
            have changed nothing.

        Raises:
            CheckpointError: if the original cannot be read.
            OutputError: if the disk refuses.
        """
        with disk_errors(out):
            out.mkdir(parents=True)
        changed = self._rewritten | self._removed | self._damage.keys() | self._second_names.keys()
        changed |= set(self._write_texts(out))
        # Before any link is made: a link moves the original's time of last change, which its reader watches.
        for name in sorted(self._rewritten - self._removed):
            self._rewrite(name, out)
        copies = {name: name for name in self._damage.keys() - self._rewritten} | self._second_names
        for name, origin in copies.items():
            with disk_errors(out / name):
                shutil.copyfile(self.checkpoint.files.path(origin), out / name)
        for name, damage in self._damage.items():
            with disk_errors(out / name):
                damage(out / name)
        for name in sorted(set(self.checkpoint.files.names()) - changed):
            _link(self.checkpoint.files.path(name), out / name)
        return sorted(changed)

    def _new(self, name: str, dtype: str, values: torch.Tensor, file: str) -> _Stored:
        assert values.dtype is _DTYPES[dtype], f"{name}: {values.dtype} for {dtype}"
        data = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _Stored(file, dtype, tuple(values.shape), data)

    def _bytes(self, stored: _Stored) -> bytes:
        return b"".join(self._pieces(stored))

    def _pieces(self, stored: _Stored) -> Iterator[bytes]:
        if isinstance(stored.data, bytes):
            yield stored.data
            return
        entry = stored.data
        for start in range(entry.start, entry.stop, _READ_BYTES):
            yield self.checkpoint.files.read(entry.file, start, min(start + _READ_BYTES, entry.stop))

    def _rewrite(self, file: str, out: Path) -> None:
        """Write a shard anew, unless it holds no tensor any more."""
        tensors = {name: stored for name, stored in self._tensors.items() if stored.file == file}
        if tensors:
            header, entries = build_header([(name, s.dtype, s.shape) for name, s in tensors.items()], file=file)
            data = (piece for entry in entries for piece in self._pieces(tensors[entry.name]))
            _write_new(out / file, itertools.chain([header], data))

    def _write_texts(self, out: Path) -> Iterator[str]:
        """Write config and index where they say something else than the original's; their names."""
        index = self._index_json()
        if self.config != self.checkpoint.config_json:
            _write_new(out / CONFIG_NAME, [config_bytes(self.config)])
            yield CONFIG_NAME
        if index != self._original_index() and INDEX_NAME not in self._removed:
            _write_new(out / INDEX_NAME, [json.dumps(index, indent=2).encode()])
            yield INDEX_NAME

    def _original_index(self) -> dict[str, Any]:
        parsed = strict_json.parse(self.checkpoint.files.read(INDEX_NAME))
        assert isinstance(parsed, dict)
        return parsed

    def _index_json(self) -> dict[str, Any]:
        """The index of the copy: of its tensors, in the original's order with new ones last, then edited."""
        weight_map = {name: stored.file for name, stored in self._tensors.items()}
        total_size = sum(payload_bytes(stored.dtype, stored.shape) for stored in self._tensors.values())
        rebuilt = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        index = rebuilt if self._index is None else self._index
        for edit in self._index_edits:
            edit(index)
        return index


def _write_new(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file that does not exist yet.

    Raises:
        OutputError: if the disk refuses.
    """
    with disk_errors(path), path.open("xb") as file:
        for piece in pieces:
            file.write(piece)


def _link(original: Path, path: Path) -> None:
    """Give a file a second name; where the file system has no links, copy it.

    Raises:
        OutputError: if the disk refuses.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(original, path)
        except OSError:
            shutil.copyfile(original, path)
