"""A parity report held against a checkpoint: is it of these bytes and their source, and does its verdict follow?

A report is a file that people can edit or mix up. Whose it is is told by hashes; what it says must agree with itself.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from v4quant import strict_json
from v4quant.checkpoint.certificate import CertificateHeader
from v4quant.checkpoint.reader import Checkpoint
from v4quant.parity.evidence import describe
from v4quant.parity.verdict import MARGIN, Verdict

_MAX_REPORT_BYTES = 256 * 2**20
# What a report must say of the candidate: the same that `describe` finds here.
_HASHES = ("source_id", "index_sha256", "config_sha256", "certificate_sha256")
_PASSING = (Verdict.IDENTICAL, Verdict.INDISTINGUISHABLE)


def read_report(path: Path) -> Mapping[str, Any] | None:
    """A parity report with the keys that are used here and on the card; None if it is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if path.stat().st_size > _MAX_REPORT_BYTES:
            return None
        report = strict_json.parse(path.read_bytes())
        numbers = [report[key] for key in ("kl_mean", "kl_max", "top1")]
        numbers += [report["noise_floor"][key] for key in ("kl_mean", "kl_max", "top1", "margin")]
        numbers += [report["noise_floor"]["limits"][key] for key in ("logits kl_mean", "logits 1 - top1")]
        numbers += [report["logits"]["bit_equal"], report["logits"]["top1"], report["logits"]["kl"]["mean"]]
        kinds = [
            isinstance(report["verdict"], str),
            isinstance(report["in_words"], str),
            isinstance(report["departures"], list),
            isinstance(report["gates"], list) and all(isinstance(gate, dict) for gate in report["gates"]),
            isinstance(report["evidence"]["candidate"], dict),
            isinstance(report["evidence"]["prompts"], list),
            isinstance(report["evidence"]["arithmetic"]["activations"], str),
            isinstance(report["coverage"]["tokens"], int),
            isinstance(report["bytes_by_role"], dict),
            isinstance(report["layers"], list) and all(isinstance(layer, dict) for layer in report["layers"]),
            all(isinstance(number, int | float) for number in numbers),
        ]
        return report if all(kinds) else None
    return None


def report_refusals(
    report: Mapping[str, Any], checkpoint: Checkpoint, certificate: CertificateHeader | None
) -> tuple[list[str], list[str]]:
    """What speaks against a report.

    Args:
        report: as `read_report` gives it.
        certificate: first line of the checkpoint's certificate; None where it has none.

    Returns:
        Why it is not of these bytes, or not one that v4quant writes; and what it found that does not pass.
    """
    own, evidence = describe(checkpoint), report["evidence"]
    other = [key for key in _HASHES if evidence["candidate"].get(key) != own[key]]
    if other:
        return [f"is not of these bytes: {', '.join(other)} differ; run v4quant parity again"], []
    reference = _reference_id(evidence)
    if reference == own["source_id"]:
        return ["compares the checkpoint with itself, expected with its source"], []
    if certificate is not None and reference != certificate.source_id:
        return [
            f"compares with another checkpoint ({str(reference)[:16]}) than the certificate's source "
            f"({certificate.source_id[:16]}); run v4quant parity --against that"
        ], []
    failed = []
    if report["verdict"] not in _PASSING:
        failed.append(f"does not pass: the verdict is {report['verdict']:.20}, expected {' or '.join(_PASSING)}")
    elif (why := _contradiction(report)) is not None:
        return [f"contradicts itself: the verdict is {report['verdict']}, but {why}; run v4quant parity again"], []
    failed += [
        f"does not pass: its gate {gate.get('name')!s:.20} was not passed"
        for gate in report["gates"]
        if gate.get("passed") is not True
    ]
    return [], failed


def _reference_id(evidence: Mapping[str, Any]) -> object:
    """The source id of what was compared with: a checkpoint, or outputs that were computed from one before."""
    for side in ("reference", "reference_outputs"):
        if isinstance(evidence.get(side), dict):
            return evidence[side].get("source_id")
    return None


def _contradiction(report: Mapping[str, Any]) -> str | None:
    """A figure that a passing verdict cannot have, by the rules of parity/verdict.py; None if there is none."""
    floor, logits = report["noise_floor"], report["logits"]
    limits = floor["limits"]
    if (report["kl_mean"], report["top1"]) != (logits["kl"]["mean"], logits["top1"]):
        return "its figures are given twice, and differ"
    if floor["margin"] != MARGIN:
        return f"its limit is {floor['margin']} times the noise, expected {MARGIN}"
    if report["departures"] or any(layer.get("departs") is not False for layer in report["layers"]):
        return "figures beyond their limits are listed"
    if not 0 <= report["kl_mean"] <= limits["logits kl_mean"] or not 1 - report["top1"] <= limits["logits 1 - top1"]:
        return "the logits are beyond their limits"
    if report["verdict"] == Verdict.IDENTICAL and logits["bit_equal"] != 1:
        return "not all logits are bit-equal"
    return None
