"""The certificate: one JSON line a tensor that says where its bytes came from, what they are, and what was proved.

File `v4quant.certificate.jsonl`: a header line, then one line for each output tensor in file order. It holds no time
and no path, so the same conversion gives the same certificate on every machine.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from v4quant import strict_json
from v4quant.checkpoint.files import Source
from v4quant.errors import CheckFailedError, CheckpointError

CERTIFICATE_NAME = "v4quant.certificate.jsonl"
CERTIFICATE_VERSION = 1
_MAX_LINE_BYTES = 2**20
_SHOWN_ROUNDED = 5


class Verdict(StrEnum):
    """What a conversion did to a tensor."""

    BIT_IDENTICAL = "bit_identical"  # the same bytes
    VALUE_EXACT = "value_exact"  # other bytes, every value and sign of zero the same
    ROUNDED = "rounded"  # at least one value changed


def verdict_counts(verdicts: Mapping[Verdict, int]) -> dict[str, int]:
    """Counts under the names that JSON output uses; every verdict is there, with 0 where nothing has it."""
    return {str(verdict): verdicts.get(verdict, 0) for verdict in Verdict}


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One line of the certificate.

    Attributes:
        tensor: name in the output.
        dtype, shape: as the output header says.
        sha256: of the output bytes.
        verdict: see Verdict; a block scale shares the verdict of its weight.
        sources: name -> sha256 of the source tensors that it was computed from.
        measured: for rounded weights the error; for value-exact ones what the proof rests on.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str
    verdict: Verdict
    sources: Mapping[str, str]
    measured: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The line as a JSON object."""
        line = {
            "tensor": self.tensor,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "sha256": self.sha256,
            "verdict": str(self.verdict),
            "sources": dict(self.sources),
        }
        return line | ({"measured": dict(self.measured)} if self.measured else {})

    def describe_error(self) -> str:
        """One line for people about a rounded tensor."""
        measured = self.measured
        return (
            f"{self.tensor}: {100 * measured['changed_share']:.3g} % of values change, relative error at most "
            f"{measured['max_relative_error']:.3g}, RMS {measured['rms_relative_error']:.3g}, "
            f"SQNR {measured.get('sqnr_db', math.inf):.1f} dB"
        )

    @classmethod
    def from_json(cls, line: object, where: str) -> "TensorRecord":
        """Read a line back.

        Raises:
            CheckpointError: if a key is missing or of another kind.
        """
        try:
            values = _kinds_checked(line)
            return cls(
                tensor=values["tensor"],
                dtype=values["dtype"],
                shape=tuple(values["shape"]),
                sha256=values["sha256"],
                verdict=Verdict(values["verdict"]),
                sources=values["sources"],
                measured=values["measured"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where}: not a line that v4quant writes ({type(error).__name__}: {error})",
                hint="Convert again; the certificate was edited or damaged.",
            ) from error


def is_rounded_weight(record: TensorRecord) -> bool:
    """True for a weight that lost bits; a block scale only shares its verdict."""
    return record.verdict is Verdict.ROUNDED and record.tensor.endswith(".weight")


def worst_first(records: Iterable[TensorRecord]) -> list[TensorRecord]:
    """Sort rounded tensors by relative RMS error, largest first."""
    return sorted(records, key=lambda record: -record.measured["rms_relative_error"])


class RoundingRefusedError(CheckFailedError):
    """A conversion would lose bits, and nobody allowed it.

    Args:
        where: what was looked at: a shard, or an unfinished run.
        target: name of the format.
        rounded: certificate lines of the weights that would be rounded.
    """

    def __init__(self, where: str, target: str, rounded: list[TensorRecord]) -> None:
        self.worst = worst_first(rounded)
        lines = "\n".join(f"  {record.describe_error()}" for record in self.worst[:_SHOWN_ROUNDED])
        super().__init__(
            f"{len(rounded):,} weights of {where} would lose bits as {target}, expected exact values; the worst:\n"
            f"{lines}",
            hint="Accept the loss with --allow-rounding, or choose a format that holds the values (bf16, fp8).",
        )


def _kinds_checked(line: object) -> dict[str, Any]:
    """Check that a tensor line has the right kinds of values; "measured" may be absent."""
    if not isinstance(line, dict):
        raise TypeError("not an object")
    values = {"measured": {}, **line}
    for key in ("tensor", "dtype", "sha256", "verdict"):
        if not isinstance(values[key], str):
            raise TypeError(f"{key} is no string")
    if not isinstance(values["shape"], list) or any(type(size) is not int for size in values["shape"]):
        raise TypeError("shape is no list of integers")
    sources, measured = values["sources"], values["measured"]
    if not isinstance(sources, dict) or not all(isinstance(digest, str) for digest in sources.values()):
        raise TypeError("sources is no object of strings")
    if not isinstance(measured, dict) or any(type(number) not in (int, float) for number in measured.values()):
        raise TypeError("measured is no object of numbers")
    return values


@dataclass(frozen=True)
class CertificateHeader:
    """First line of the certificate: what was converted into what, by which version."""

    tool_version: str
    source_id: str
    source_format: str
    target: str
    config_sha256: str
    tensors: int

    def to_json(self) -> dict[str, Any]:
        """The line as a JSON object."""
        return {"certificate": CERTIFICATE_VERSION, **vars(self)}

    @classmethod
    def from_json(cls, line: object, where: str) -> "CertificateHeader":
        """Read the first line back.

        Raises:
            CheckpointError: if it is of another version or not such a line.
        """
        if not isinstance(line, dict) or line.get("certificate") != CERTIFICATE_VERSION:
            raise CheckpointError(
                f"{where}: expected a version {CERTIFICATE_VERSION} certificate header",
                hint="Convert again with this version of v4quant.",
            )
        values = {key: value for key, value in line.items() if key != "certificate"}
        kinds = {key: int if key == "tensors" else str for key in cls.__dataclass_fields__}
        if set(values) != set(kinds) or any(type(values[key]) is not kind for key, kind in kinds.items()):
            raise CheckpointError(
                f"{where}: expected the keys {', '.join(kinds)}, found {', '.join(map(str, values))}",
                hint="Convert again; the certificate was edited or damaged.",
            )
        return cls(**values)


def read_certificate(files: Source, name: str = CERTIFICATE_NAME) -> tuple[CertificateHeader, Iterator[TensorRecord]]:
    """Read a certificate, line by line.

    Raises:
        CheckpointError: if there is none, or a line is damaged (raised when the iterator reaches it).
    """
    if name not in files:
        raise CheckpointError(
            f"{files.where}: no {name}, so there is nothing to verify the bytes against",
            hint=f"Compare with the checkpoint it was made from: v4quant verify {files.where} --against SRC",
        )
    lines, where = _json_lines(files, name), f"{files.where}/{name}"
    header = CertificateHeader.from_json(next(lines, (1, None))[1], f"{where} line 1")
    records = (TensorRecord.from_json(line, f"{where} line {number}") for number, line in lines)
    return header, records


def _json_lines(files: Source, name: str) -> Iterator[tuple[int, object]]:
    """Lines of the certificate with their numbers, a megabyte in memory at a time."""
    size, start, rest, number = files.size(name), 0, b"", 0
    while start < size or rest:
        stop = min(size, start + _MAX_LINE_BYTES)
        rest += files.read(name, start, stop)
        start = stop
        *whole, rest = rest.split(b"\n") if start < size else (*rest.splitlines(), b"")
        if not whole and len(rest) > _MAX_LINE_BYTES:
            whole, rest = [rest], b""  # an endless line: let the parser refuse it
        for text in whole:
            number += 1
            try:
                yield number, strict_json.parse(text)
            except ValueError as error:
                raise CheckpointError(
                    f"{files.where}/{name} line {number}: not JSON ({error})",
                    hint="Convert again; the certificate was edited or damaged.",
                ) from error
