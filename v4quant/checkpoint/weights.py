"""Read tensors of a checkpoint as torch tensors: as stored, or matrices decoded to BF16, whatever they are stored as.

Every E4M3 x 2^k and E2M1 x 2^k of a V4 weight is a BF16 number, so decoding is exact; where it is not (F32 scales
that are no powers of two), that is an error and no rounding behind the user's back.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from v4quant.checkpoint.files import Source
from v4quant.checkpoint.header import TensorEntry
from v4quant.encodings import BF16, Encoding, Scheme
from v4quant.errors import CheckpointError
from v4quant.formats.cast import Array, Scratch, Weight, cast, codes_dtype, scale_dtype
from v4quant.names import Role, TensorName, scale_name
from v4quant.numerics.errors import NonFiniteError

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
_CODES = {"I8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
_SCALES = {"F8_E8M0": torch.uint8, "F32": torch.float32}


class Holder(Protocol):
    """What tensors are read from: a checkpoint, or what one rank of a sharded one holds."""

    @property
    def where(self) -> str:
        """Its name, for messages."""

    @property
    def files(self) -> Source:
        """The folder."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Where each tensor lies."""

    @property
    def parsed(self) -> Mapping[str, TensorName]:
        """Their names, taken apart."""

    @property
    def scheme(self) -> Scheme:
        """How quantised matrices are stored."""

    def require_sound(self) -> None:
        """Refuse one that contradicts itself.

        Raises:
            CheckpointError: if it does.
        """


class Buffers(Scratch):
    """Memory that matrices are read and decoded in, again and again; what lies in it lives until its next use."""


# Of a matrix that is decoded in pieces: with the codes it came from, a piece stays in a core's cache until it is used.
_PIECE_BYTES = 2 * 2**20
_PIECE_ROWS = 128


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised matrix as it is stored, decoded some rows at a time by whoever multiplies with it.

    Attributes:
        where: file and name, for messages.
        stored: codes and scale.
    """

    where: str
    stored: Weight

    def pieces(self) -> Iterator[torch.Tensor]:
        """Its rows in order, decoded: bfloat16 [some, in], valid until this thread asks for the next piece of any.

        Raises:
            CheckpointError: as Weights.matrix.
        """
        rows, columns = self.stored.shape
        step = max(_PIECE_BYTES // (2 * columns) // _PIECE_ROWS, 1) * _PIECE_ROWS
        for first in range(0, rows, step):
            yield _decode(self.where, self.stored.rows(first, min(first + step, rows)), _piece.buffers)


def _without_nan(found: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor itself. Infinities may be meant, as in attention sinks; NaN is damage that would spread in silence.

    Raises:
        CheckpointError: at the first NaN.
    """
    if found.is_floating_point() and bool(found.isnan().any()):
        place = found.isnan().nonzero()[0].tolist()
        raise CheckpointError(f"{where}: NaN at {place}, expected numbers", hint="The weights are damaged.")
    return found


class _Piece(threading.local):
    """The piece that a thread has decoded last."""

    def __init__(self) -> None:
        self.buffers = Buffers()


_piece = _Piece()


def _decode(where: str, stored: Weight, buffers: Buffers) -> torch.Tensor:
    """Decode into buffers: bfloat16 [out, in].

    Raises:
        CheckpointError: if a number is not finite, or BF16 cannot hold one.
    """
    decoded = buffers.array("decoded", stored.shape, codes_dtype(BF16))
    try:
        check = cast(stored, Weight(BF16, decoded), buffers)
    except NonFiniteError as error:
        raise CheckpointError(f"{where}: {error}", hint="The weights are damaged.") from error
    if check.inexact:
        raise CheckpointError(
            f"{where}: {check.inexact:,} values do not fit BF16, expected none",
            hint="Convert the checkpoint first, with --allow-rounding.",
        )
    return torch.from_numpy(decoded).view(torch.bfloat16)


class Weights:
    """The tensors of one checkpoint, read on demand; safe from any thread.

    Attributes:
        bytes_read: stored bytes read so far.
    """

    def __init__(self, source: Holder) -> None:
        """Read from a sound checkpoint, or from a rank of one.

        Raises:
            CheckpointError: if the checkpoint has problems.
        """
        source.require_sound()
        self.source = source
        self.bytes_read = 0
        self._lock = threading.Lock()

    @property
    def scheme(self) -> Scheme:
        """How quantised matrices are stored."""
        return self.source.scheme

    def has(self, name: str) -> bool:
        """True if the checkpoint stores this tensor."""
        return name in self.source.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape of a tensor.

        Raises:
            CheckpointError: if there is none of this name.
        """
        return self._entry(name).shape

    def encoding(self, module: str) -> Encoding:
        """How a matrix that some release quantises is stored."""
        return self._encoding(self._entry(f"{module}.weight"))

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that no format quantises, in its stored dtype and shape.

        Raises:
            CheckpointError: if there is none of this name, it cannot be read, or it holds a NaN.
        """
        entry = self._entry(name)
        buffer = np.empty(entry.bytes, np.uint8)
        self._read(entry, buffer)
        found = torch.from_numpy(buffer).view(_DTYPES[entry.dtype]).reshape(entry.shape)
        return _without_nan(found, f"{entry.file}: {entry.name}")

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of a tensor that no format quantises: its stored dtype, [stop - start, ...].

        Raises:
            CheckpointError: as tensor.
            ValueError: if the tensor has no such rows.
        """
        entry = self._entry(name)
        if not 0 <= start <= stop <= entry.shape[0]:
            raise ValueError(f"rows {start} to {stop} of {name}, which has {entry.shape[0]}")
        if start == stop:  # a rank may hold none of the rows that are asked of all; views of nothing raise
            return torch.empty(0, *entry.shape[1:], dtype=_DTYPES[entry.dtype])
        row_bytes = entry.bytes // entry.shape[0]
        buffer = np.empty((stop - start) * row_bytes, np.uint8)
        self._read(entry, buffer, start * row_bytes)
        found = torch.from_numpy(buffer).view(_DTYPES[entry.dtype]).reshape(stop - start, *entry.shape[1:])
        return _without_nan(found, f"{entry.file}: {entry.name}, from row {start} on")

    def matrix(self, module: str, buffers: Buffers | None = None) -> torch.Tensor:
        """A matrix that some release quantises, decoded: bfloat16 [out, in].

        Args:
            module: its name without ".weight".
            buffers: to read and decode in, else new ones; the result lives in them until their next use.

        Raises:
            CheckpointError: if there is none, it holds a number that is not finite, or BF16 cannot hold its values.
        """
        entry = self._entry(f"{module}.weight")
        encoding = self._encoding(entry)
        if encoding == BF16 and buffers is None:
            return self.tensor(entry.name)
        buffers = buffers or Buffers()
        stored = self._stored(entry, encoding, buffers)
        if encoding == BF16:
            return _without_nan(torch.from_numpy(stored.codes).view(torch.bfloat16), f"{entry.file}: {entry.name}")
        return _decode(f"{entry.file}: {entry.name}", stored, buffers)

    def stored(self, module: str, buffers: Buffers) -> StoredMatrix:
        """A matrix that some release quantises, to be decoded later, piece by piece; the buffers hold it until then.

        Raises:
            CheckpointError: if there is none of this name, or it cannot be read.
        """
        entry = self._entry(f"{module}.weight")
        return StoredMatrix(f"{entry.file}: {entry.name}", self._stored(entry, self._encoding(entry), buffers))

    def codes(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A quantised matrix as it is stored.

        Returns:
            FP4: uint8 [out, in/2] and uint8 (E8M0) [out, in/32]. FP8: float8_e4m3fn [out, in], and uint8 (E8M0) or
            float32 [out/128, in/128], rounded up.

        Raises:
            CheckpointError: if there is none of this name, or it cannot be read.
        """
        entry = self._entry(f"{module}.weight")
        encoding = self._encoding(entry)
        stored = self._stored(entry, encoding, Buffers())
        codes = torch.from_numpy(stored.codes).view(_CODES[encoding.weight_dtype])
        return codes, torch.from_numpy(stored.scales).view(_SCALES[encoding.scale_dtype])

    def _stored(self, entry: TensorEntry, encoding: Encoding, buffers: Buffers) -> Weight:
        """Codes, and scale where the encoding has one, read into buffers."""
        codes = buffers.array("stored codes", entry.shape, codes_dtype(encoding))
        self._read(entry, codes)
        if encoding.block is None:
            return Weight(encoding, codes)
        scale_entry = self._entry(scale_name(entry.name))
        scale = buffers.array("stored scale", scale_entry.shape, scale_dtype(encoding))
        self._read(scale_entry, scale)
        return Weight(encoding, codes, scale)

    def _entry(self, name: str) -> TensorEntry:
        entry = self.source.tensors.get(name)
        if entry is None:
            raise CheckpointError(
                f"{self.source.where}: has no tensor {name}",
                hint=f"See what it holds with: v4quant inspect {self.source.files.where}",
            )
        return entry

    def _encoding(self, entry: TensorEntry) -> Encoding:
        if entry.dtype == BF16.weight_dtype:  # ranks hold wo_a so, whatever the checkpoint's scheme
            return BF16
        scheme = self.source.scheme
        return scheme.expert if self.source.parsed[entry.name].role is Role.ROUTED_EXPERTS else scheme.dense

    def _read(self, entry: TensorEntry, into: Array, offset: int = 0) -> None:
        data = into.reshape(-1).view(np.uint8).data
        self.source.files.read_into(entry.file, entry.start + offset, data)
        with self._lock:
            self.bytes_read += len(data)
