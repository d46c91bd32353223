"""What a verification found: verdicts, mismatches, and how those of several processes become one report."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from v4quant.checkpoint.certificate import Verdict, verdict_counts
from v4quant.checkpoint.process_group import ProcessGroup


@dataclass(frozen=True)
class Mismatch:
    """One tensor or file that is not as it should be.

    Attributes:
        tensor: its name; a file's name for what concerns no tensor.
        reason: expected and found.
        details: for a wrong value its coordinate, expected and found values.
    """

    tensor: str
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The mismatch as a JSON object."""
        return {"tensor": self.tensor, "reason": self.reason, **self.details}


@dataclass
class VerifyReport:
    """What a verification found.

    Attributes:
        verdicts: tensors that are as they should be, by verdict.
        mismatches: those that are not.
    """

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    mismatches: list[Mismatch] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.mismatches


@dataclass
class Findings:
    """What one process found.

    Attributes:
        verdicts: tensors that are as they should be, by verdict.
        mismatches: those that are not, with their number in the order that all processes share.
    """

    verdicts: Counter[Verdict] = field(default_factory=Counter)
    mismatches: list[tuple[int, Mismatch]] = field(default_factory=list)

    def merge_into(self, report: VerifyReport, group: ProcessGroup) -> None:
        """Add what all processes found to the first one's report, in order; in the others, what they found."""
        numbered = [(number, vars(mismatch)) for number, mismatch in self.mismatches]
        everyone = group.gather([verdict_counts(self.verdicts), numbered])
        for verdicts, mismatches in everyone[1:]:
            self.verdicts += Counter({Verdict(verdict): count for verdict, count in verdicts.items()})
            self.mismatches += [(number, Mismatch(**values)) for number, values in mismatches]
        report.verdicts += self.verdicts
        report.mismatches += [mismatch for _, mismatch in sorted(self.mismatches, key=lambda numbered: numbered[0])]
