"""Hashes of what goes by while a sharding or a merge moves a file: of the file, of each tensor, of each share."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from v4quant.checkpoint.certificate import TensorRecord, Verdict
from v4quant.checkpoint.sharding.layout import Placement


@dataclass(frozen=True)
class ShareRecord:
    """A certificate's line for a share of a tensor, and which share it is.

    Attributes:
        share: its number, 0 where the tensor is whole.
        record: the line.
    """

    share: int
    record: TensorRecord

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object, for the journal."""
        return {"share": self.share, **self.record.to_json()}


class FileHash:
    """The hash of a file alone; see stream.Watch."""

    def __init__(self) -> None:
        self.file = hashlib.sha256()

    def whole(self, data: memoryview) -> None:
        """Bytes of the file."""
        self.file.update(data)

    def share(self, number: int, data: memoryview) -> None:
        """Not asked for."""


class TensorHashes(FileHash):
    """The hashes of a file, and of the tensor that goes by and its shares."""

    def __init__(self) -> None:
        super().__init__()
        self._tensor = hashlib.sha256()
        self._shares: dict[int, Any] = {}

    def begin(self) -> None:
        """Another tensor comes."""
        self._tensor, self._shares = hashlib.sha256(), {}

    def whole(self, data: memoryview) -> None:
        """Bytes of the tensor."""
        super().whole(data)
        self._tensor.update(data)

    def share(self, number: int, data: memoryview) -> None:
        """Bytes of a share of it."""
        self._shares.setdefault(number, hashlib.sha256()).update(data)

    @property
    def tensor(self) -> str:
        """Hash of the tensor that went by."""
        return self._tensor.hexdigest()

    def records(self, place: Placement) -> Iterator[ShareRecord]:
        """Certificate lines of the shares of the tensor that went by."""
        whole = self.tensor
        for number, (part, *_) in enumerate(place.shares):
            digest = self._shares[number].hexdigest() if self._shares else whole
            sources = {place.source.name: whole}
            record = TensorRecord(part.name, part.dtype, part.shape, digest, Verdict.BIT_IDENTICAL, sources)
            yield ShareRecord(number, record)

    def whole_record(self, place: Placement) -> ShareRecord:
        """Certificate line of the whole tensor that went by."""
        entry, whole = place.source, self.tensor
        record = TensorRecord(entry.name, entry.dtype, entry.shape, whole, Verdict.BIT_IDENTICAL, {entry.name: whole})
        return ShareRecord(0, record)
