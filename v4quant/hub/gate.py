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

from v4quant import strict_json
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
from v4quant.hub.uploads import Uploads, lines_sha256
from v4quant.parity.evidence import describe

_MAX_REPORT_BYTES = 256 * 2**20
_SHOWN = 5
_WORST = 5
# What a report must say of the candidate: the same that `describe` finds here.
_HASHES = ("source_id", "index_sha256", "config_sha256", "certificate_sha256")
_PASSING = ("identical", "indistinguishable")
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
    """

    refusals: list[str] = field(default_factory=list)
    certificate: CertificateHeader | None = None
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    worst: list[TensorRecord] = field(default_factory=list)
    negative_zeros_lost: int = 0
    report: Mapping[str, Any] | None = None


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
    report = _read_report(path)
    if report is None:
        exam.refusals.append(f"{path.name} is no parity report that v4quant writes, or none at all")
        return
    evidence = report["evidence"]
    own = describe(checkpoint)
    other = [key for key in _HASHES if evidence["candidate"].get(key) != own[key]]
    if other:
        exam.refusals.append(f"{path.name} is not of these bytes: {', '.join(other)} differ; run v4quant parity again")
        return
    reference = evidence.get("reference")
    if isinstance(reference, dict) and reference.get("source_id") == own["source_id"]:
        exam.refusals.append(f"{path.name} compares the checkpoint with itself, expected with its source")
        return
    exam.report = report
    if report["verdict"] not in _PASSING:
        exam.refusals.append(f"{path.name}: the verdict is {report['verdict']!s:.20}, expected {' or '.join(_PASSING)}")
    for gate in report["gates"]:
        if gate.get("passed") is not True:
            exam.refusals.append(f"{path.name}: its gate {gate.get('name')!s:.20} was not passed")


def _read_report(path: Path) -> Mapping[str, Any] | None:
    """A parity report with the keys that are used here and on the card; None if it is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if path.stat().st_size > _MAX_REPORT_BYTES:
            return None
        report = strict_json.parse(path.read_bytes())
        numbers = [report[key] for key in ("kl_mean", "kl_max", "top1")]
        numbers += [report["noise_floor"][key] for key in ("kl_mean", "kl_max", "top1", "margin")]
        kinds = [
            isinstance(report["verdict"], str),
            isinstance(report["in_words"], str),
            isinstance(report["gates"], list) and all(isinstance(gate, dict) for gate in report["gates"]),
            isinstance(report["evidence"]["candidate"], dict),
            isinstance(report["evidence"]["prompts"], list),
            isinstance(report["evidence"]["arithmetic"]["activations"], str),
            isinstance(report["coverage"]["tokens"], int),
            isinstance(report["bytes_by_role"], dict),
            isinstance(report["layers"], list),
            all(isinstance(number, int | float) for number in numbers),
        ]
        return report if all(kinds) else None
    return None
