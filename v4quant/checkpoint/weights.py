"""Read tensors of a checkpoint as torch tensors; matrices decoded to BF16, whatever they are stored as.

Every E4M3 x 2^k and E2M1 x 2^k of a V4 weight is a BF16 number, so decoding is exact; where it is not (F32 scales
that are no powers of two), that is an error and no rounding behind the user's back.
"""

import torch

from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.reader import Checkpoint
from v4quant.encodings import BF16, Encoding
from v4quant.errors import CheckpointError
from v4quant.formats.cast import Scratch, Weight, cast, codes_dtype, scale_dtype
from v4quant.names import Role, scale_name
from v4quant.numerics.errors import NonFiniteError

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}


class Weights:
    """The tensors of one checkpoint, read on demand; safe from any thread.

    Attributes:
        bytes_read: stored bytes read so far.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read from a sound checkpoint.

        Raises:
            CheckpointError: if the checkpoint has problems.
        """
        checkpoint.require_sound()
        self.checkpoint = checkpoint
        self.bytes_read = 0

    def has(self, name: str) -> bool:
        """True if the checkpoint stores this tensor."""
        return name in self.checkpoint.tensors

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that no format quantises, in its stored dtype and shape.

        Raises:
            CheckpointError: if there is none of this name, or it cannot be read.
        """
        entry = self._entry(name)
        return torch.frombuffer(self._read(entry), dtype=_DTYPES[entry.dtype]).reshape(entry.shape)

    def matrix(self, module: str) -> torch.Tensor:
        """A matrix that some release quantises, decoded: bfloat16 [out, in].

        Args:
            module: its name without ".weight".

        Raises:
            CheckpointError: if there is none, it holds a number that is not finite, or BF16 cannot hold its values.
        """
        entry = self._entry(f"{module}.weight")
        encoding = self._encoding(entry)
        if encoding == BF16:
            return self.tensor(entry.name)
        scale_entry = self._entry(scale_name(entry.name))
        codes = torch.frombuffer(self._read(entry), dtype=torch.uint8).numpy().view(codes_dtype(encoding))
        scale = torch.frombuffer(self._read(scale_entry), dtype=torch.uint8).numpy().view(scale_dtype(encoding))
        source = Weight(encoding, codes.reshape(entry.shape), scale.reshape(scale_entry.shape))
        out = torch.empty(source.shape, dtype=torch.uint16)
        try:
            check = cast(source, Weight(BF16, out.numpy()), Scratch())
        except NonFiniteError as error:
            raise CheckpointError(f"{entry.file}: {entry.name}: {error}", hint="The weights are damaged.") from error
        if check.inexact:
            raise CheckpointError(
                f"{entry.file}: {entry.name}: {check.inexact:,} values do not fit BF16, expected none",
                hint="Convert the checkpoint first, with --allow-rounding.",
            )
        return out.view(torch.bfloat16)

    def _entry(self, name: str) -> TensorEntry:
        entry = self.checkpoint.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.checkpoint.where}: has no tensor {name}", hint="Look at it with: inspect")
        return entry

    def _encoding(self, entry: TensorEntry) -> Encoding:
        scheme = self.checkpoint.scheme
        return scheme.expert if self.checkpoint.parsed[entry.name].role is Role.ROUTED_EXPERTS else scheme.dense

    def _read(self, entry: TensorEntry) -> bytearray:
        buffer = bytearray(entry.bytes)
        self.checkpoint.files.read_into(entry.file, entry.start, memoryview(buffer))
        self.bytes_read += entry.bytes
        return buffer
