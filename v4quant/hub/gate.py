"""What a checkpoint must have passed before it is published: its certificate, and a parity run over these very bytes.

Nothing is believed that can be computed: every tensor here is hashed again, and the report's hashes of config, index,
headers and certificate are compared with those of the folder. Shards that a conversion uploaded were hashed on their
way and are held against the Hub's own sha256.
"""

import contextlib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v4quant.checkpoint.certificate import (
    CERTIFICATE_NAME,
    CertificateHeader,
    TensorRecord,
    Verdict,
    read_certificate,
    worst_first,
)
from v4quant.checkpoint.index import INDEX_NAME, parse_index
from v4quant.checkpoint.reader import Checkpoint
from v4quant.checkpoint.verify import verify_hashes
from v4quant.errors import CheckpointError
from v4quant.hub.remote_files import RemoteFiles
from v4quant.hub.report import read_report, report_refusals
from v4quant.hub.uploads import Uploads, lines_sha256

_SHOWN = 5
_WORST = 5
Advance = Callable[[int, str], None]


@dataclass
class Exam:
    """What a checkpoint has passed, and what not.

    Attributes:
        refusals: why it is not published; empty if nothing speaks against it.
        certificate: the first line of the certificate.
        verdicts: tensors by verdict.
        worst: the rounded weights of the largest relative RMS error.
        negative_zeros_lost: over all tensors.
        report: the parity report, if it is of these bytes.
        is_certified: every byte fits the certificate, so what that says, and a report on it, is true of these bytes.
    """

    refusals: list[str] = field(default_factory=list)
    certificate: CertificateHeader | None = None
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    worst: list[TensorRecord] = field(default_factory=list)
    negative_zeros_lost: int = 0
    report: Mapping[str, Any] | None = None
    is_certified: bool = False


def examine(
    checkpoint: Checkpoint,
    report: Path | None,
    uploads: Uploads | None,
    staged: RemoteFiles | None,
    *,
    workers: int,
    progress: Advance,
) -> Exam:
    """Find out whether a checkpoint may be published.

    Args:
        checkpoint: what is to be published.
        report: parity.json, or None.
        uploads: what is known of shards that are not in the folder.
        staged: the branch that they are on.
        progress: told bytes hashed, and of which file.
    """
    exam = Exam()
    exam.refusals += [f"{name} is missing, the index names it" for name in _missing_shards(checkpoint)]
    exam.refusals += [text for text, _ in checkpoint.problem_groups]
    if CERTIFICATE_NAME not in checkpoint.files:
        exam.refusals.append(f"there is no certificate ({CERTIFICATE_NAME}): nobody knows what it was made of")
    else:
        try:
            exam.certificate = _examine_certificate(checkpoint, exam)
            if not exam.refusals:
                _examine_bytes(checkpoint, exam, uploads, staged, workers, progress)
        except CheckpointError as error:
            exam.refusals.append(str(error))
    exam.is_certified = exam.certificate is not None and not exam.refusals
    _examine_report(checkpoint, exam, report)
    return exam


def _missing_shards(checkpoint: Checkpoint) -> list[str]:
    """Files that the index names and that are not there."""
    with contextlib.suppress(CheckpointError):
        if INDEX_NAME in checkpoint.files:
            index = parse_index(checkpoint.files.read(INDEX_NAME), INDEX_NAME)
            return sorted(set(index.weight_map.values()) - checkpoint.header_sha256.keys())
    return []


def _examine_certificate(checkpoint: Checkpoint, exam: Exam) -> CertificateHeader:
    """Count what the certificate says."""
    header, records = read_certificate(checkpoint.files)
    rounded: list[TensorRecord] = []
    for record in records:
        exam.verdicts[record.verdict] += 1
        if record.tensor.endswith(".weight"):
            exam.negative_zeros_lost += int(record.measured.get("negative_zeros_lost", 0))
            if record.verdict is Verdict.ROUNDED:
                rounded.append(record)
    exam.worst = worst_first(rounded)[:_WORST]
    return header


def _examine_bytes(
    checkpoint: Checkpoint,
    exam: Exam,
    uploads: Uploads | None,
    staged: RemoteFiles | None,
    workers: int,
    progress: Advance,
) -> None:
    """Compare every byte with the certificate, here or by the hashes that the Hub lists."""
    if uploads is not None:
        assert staged is not None
        exam.refusals += _uploaded_refusals(checkpoint, uploads, staged)
        return
    mismatches = verify_hashes(checkpoint, workers=workers, progress=progress).mismatches
    exam.refusals += [f"{found.tensor}: {found.reason}" for found in mismatches[:_SHOWN]]
    if len(mismatches) > _SHOWN:
        exam.refusals.append(f"{len(mismatches) - _SHOWN:,} more tensors do not match the certificate")


def _uploaded_refusals(checkpoint: Checkpoint, uploads: Uploads, staged: RemoteFiles) -> list[str]:
    header, records = read_certificate(checkpoint.files)
    refusals: list[str] = []
    if hashlib.sha256(checkpoint.config_bytes).hexdigest() != header.config_sha256:
        refusals.append("config.json is not the file that the certificate was made with")
    lines: dict[str, list[TensorRecord]] = defaultdict(list)
    seen: set[str] = set()
    for record in records:
        entry = checkpoint.tensors.get(record.tensor)
        if entry is None or record.tensor in seen or (entry.dtype, entry.shape) != (record.dtype, record.shape):
            refusals.append(f"{record.tensor}: the certificate's line is not of the tensor that is stored")
            break
        seen.add(record.tensor)
        lines[entry.file].append(record)
    if not refusals and (seen != checkpoint.tensors.keys() or header.tensors != len(seen)):
        refusals.append("the certificate does not have a line for each tensor")
    for name in sorted(checkpoint.header_sha256):
        known = uploads.shards.get(name)
        if known is None:
            refusals.append(f"{name}: was never uploaded whole")
        elif (known.size, known.sha256) != (staged.size(name), staged.file(name).sha256):
            refusals.append(f"{name}: on {staged.where} it is not the file that was uploaded")
        elif not refusals and known.lines_sha256 != lines_sha256(lines[name]):
            refusals.append(f"{name}: the certificate's lines are not those that it was uploaded with")
    return refusals


def _examine_report(checkpoint: Checkpoint, exam: Exam, path: Path | None) -> None:
    """Hold the parity report against the folder."""
    if path is None:
        exam.refusals.append("no parity report: nobody knows whether it computes what its source computes")
        return
    report = read_report(path)
    if report is None:
        exam.refusals.append(f"{path.name} is no parity report that v4quant writes, or none at all")
        return
    strange, failed = report_refusals(report, checkpoint, exam.certificate)
    if not strange and not exam.is_certified:
        # Hashes of headers and certificate are those of these bytes only where the bytes are the certificate's.
        strange = ["cannot be held against these bytes, as no certificate fits them"]
    exam.refusals += [f"{path.name} {reason}" for reason in strange + failed]
    if not strange:
        exam.report = report
