"""Plant every corruption in a copy of the small checkpoint, run the three checks on it, and tabulate what they say.

    inspect     open_checkpoint and its problems: headers, index and config, no values
    verify      every value and the config against the sound checkpoint
    parity      the forward pass against that of the sound checkpoint, given from outside

The first row is the control, a copy without a fault: a check that complains about it proves nothing by its other rows.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4quant.checkpoint.output import disk_errors
from v4quant.checkpoint.reader import Checkpoint, open_checkpoint
from v4quant.checkpoint.verify import verify_values
from v4quant.errors import InterruptedRunError, OutputError, V4QuantError
from v4quant.parity.remembered import UnusableReferenceError
from v4quant.parity.selftest.corruption import Corruption
from v4quant.parity.selftest.corruptions import CORRUPTIONS
from v4quant.parity.selftest.editor import Editor
from v4quant.parity.selftest.reduce import MAX_EXPERTS, MAX_VOCABULARY, reduce_checkpoint

ParityCheck = Callable[[Path], tuple[bool, str]]
Progress = Callable[[int, int, str], None]

CHECKS = ("inspect", "verify", "parity")
CONTROL = "no-fault"
NOT_REACHED = "not reached: inspect refuses it"
_SOUND, _ORIGINALS, _COPY = "sound", "originals", "copy"
_NOTHING_CHANGED = "the tensors here are the same with it as without"


@dataclass(frozen=True)
class Finding:
    """What one check says of one copy.

    Attributes:
        caught: whether it refuses the copy.
        reason: why, one line; for a copy that passes, what was looked at or why not.
    """

    caught: bool
    reason: str


@dataclass(frozen=True)
class Row:
    """One corruption and what the checks say of it.

    Attributes:
        name, what: of the corruption.
        inspect, verify, parity: the findings; None where the corruption was not planted.
        skipped: why it was not planted; "" if it was.
    """

    name: str
    what: str
    inspect: Finding | None = None
    verify: Finding | None = None
    parity: Finding | None = None
    skipped: str = ""

    @property
    def is_control(self) -> bool:
        """True for the copy without a fault."""
        return self.name == CONTROL

    @property
    def caught_by(self) -> list[str]:
        """Names of the checks that refuse the copy."""
        return [check for check in CHECKS if (finding := self.finding(check)) is not None and finding.caught]

    def finding(self, check: str) -> Finding | None:
        """What one of CHECKS says."""
        return {"inspect": self.inspect, "verify": self.verify, "parity": self.parity}[check]

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object; a check that did not run is null."""
        findings = {
            check: {"caught": finding.caught, "reason": finding.reason} if (finding := self.finding(check)) else None
            for check in CHECKS
        }
        return {
            "corruption": self.name,
            "what": self.what,
            **findings,
            "caught_by": self.caught_by,
            "skipped": self.skipped,
        }


def planted(rows: Iterable[Row]) -> list[Row]:
    """The rows of faults that were planted: not the control, nothing skipped."""
    return [row for row in rows if not row.is_control and not row.skipped]


def caught_counts(rows: Iterable[Row]) -> dict[str, int]:
    """How many faults each check catches, by check."""
    found = planted(rows)
    return {check: sum(check in row.caught_by for row in found) for check in CHECKS}


def blind_spots(rows: Iterable[Row]) -> list[str]:
    """Names of the faults that no check catches."""
    return [row.name for row in planted(rows) if not row.caught_by]


def false_alarms(rows: Iterable[Row]) -> list[str]:
    """Names of the checks that complain about the copy without a fault."""
    return [check for row in rows if row.is_control for check in row.caught_by]


def table_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The whole table as a JSON object."""
    return {
        "planted": len(planted(rows)),
        "caught": caught_counts(rows),
        "blind": blind_spots(rows),
        "false_alarms": false_alarms(rows),
        "skipped": {row.name: row.skipped for row in rows if row.skipped},
        "rows": [row.to_json() for row in rows],
    }


def _ignore(_done: int, _total: int, _name: str) -> None:
    """Report progress to nobody."""


def run_selftest(
    source: Checkpoint,
    work_folder: Path,
    parity_check: ParityCheck,
    progress: Progress = _ignore,
    *,
    corruptions: Sequence[Corruption] = tuple(CORRUPTIONS.values()),
    max_experts: int = MAX_EXPERTS,
    max_vocabulary: int = MAX_VOCABULARY,
) -> list[Row]:
    """Reduce a checkpoint, plant each corruption in a copy of its own, and run the checks.

    Args:
        source: the user's checkpoint; sound. It is only read.
        work_folder: made if missing; what is written there is removed again, also on an error or an interrupt. Needs
            about three times the size of the small checkpoint.
        parity_check: given a copy's folder, says whether the forward pass shows a difference from the checkpoint in
            `sound_folder(work_folder)`, and why. First called for the copy without a fault.
        progress: told how many rows are done, of how many, and the name of the next one.
        corruptions: those to plant.
        max_experts, max_vocabulary: as reduce_checkpoint takes them.

    Returns:
        The control, then a row a corruption.

    Raises:
        CheckpointError: if the source has problems, or cannot be read.
        OutputError: if the work folder holds an earlier run's folders, or its disk is too small or refuses.
    """
    folders = [work_folder / name for name in (_SOUND, _ORIGINALS, _COPY)]
    for folder in folders:
        _require_absent(folder)
    run = _Run(work_folder, parity_check)
    total = len(corruptions) + 1
    is_new = not work_folder.exists()
    try:
        progress(0, total, CONTROL)
        # Copies are links to files of their own: a link would change those that parity keeps open (files.fingerprint).
        for name in (_SOUND, _ORIGINALS):
            folder = work_folder / name
            reduce_checkpoint(source, folder, max_experts=max_experts, max_vocabulary=max_vocabulary)
        rows = [run.control()]
        for done, corruption in enumerate(corruptions, start=1):
            progress(done, total, corruption.name)
            rows.append(run.row(corruption))
        return rows
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                work_folder.rmdir()


def sound_folder(work_folder: Path) -> Path:
    """Where the small sound checkpoint lies while run_selftest runs; its files do not change."""
    return work_folder / _SOUND


class _Run:
    """The checks, copy after copy."""

    def __init__(self, work_folder: Path, parity_check: ParityCheck) -> None:
        self._originals = work_folder / _ORIGINALS
        self._sound = work_folder / _SOUND
        self._copy = work_folder / _COPY
        self._parity_check = parity_check

    def control(self) -> Row:
        """Check a copy without a fault."""
        try:
            Editor(open_checkpoint(self._originals)).finish(self._copy)
            return self._checked(CONTROL, "A copy without a fault: no check may complain.")
        finally:
            _remove(self._copy)

    def row(self, corruption: Corruption) -> Row:
        """Plant a corruption and check the copy."""
        # Opened anew, as the links of the last copy have moved the files' times.
        originals = open_checkpoint(self._originals)
        why_not = corruption.applies(originals)
        if why_not:
            return Row(corruption.name, corruption.what, skipped=why_not)
        editor = Editor(originals)
        corruption.apply(editor)
        try:
            if not editor.finish(self._copy):
                return Row(corruption.name, corruption.what, skipped=_NOTHING_CHANGED)
            return self._checked(corruption.name, corruption.what)
        finally:
            _remove(self._copy)

    def _checked(self, name: str, what: str) -> Row:
        inspect = self._finding(self._inspect)
        verify = self._finding(self._verify)
        parity = Finding(False, NOT_REACHED) if inspect.caught else self._finding(self._parity)
        return Row(name, what, inspect, verify, parity)

    def _finding(self, check: Callable[[], Finding]) -> Finding:
        """Run a check; an error that v4quant raises about the copy counts as caught, any other is a defect."""
        try:
            found = check()
        except (InterruptedRunError, OutputError, UnusableReferenceError):  # says nothing about the copy
            raise
        except V4QuantError as error:
            found = Finding(True, str(error))
        reason = found.reason.replace(f"{self._copy}/", "").replace(f"{self._copy}: ", "")
        return Finding(found.caught, " ".join(reason.split()))

    def _inspect(self) -> Finding:
        problems = open_checkpoint(self._copy).problems
        if problems:
            return Finding(True, _first_of([str(problem) for problem in problems]))
        return Finding(False, "headers, index and config fit together")

    def _verify(self) -> Finding:
        report = verify_values(open_checkpoint(self._copy), open_checkpoint(self._sound))
        if report.ok:
            return Finding(
                False, f"every value of {sum(report.verdicts.values()):,} tensors and the config are the same"
            )
        return Finding(True, _first_of([f"{found.tensor}: {found.reason}" for found in report.mismatches]))

    def _parity(self) -> Finding:
        return Finding(*self._parity_check(self._copy))


def _first_of(reasons: list[str]) -> str:
    """The first reason, and how many there are besides."""
    return reasons[0] + (f" (and {len(reasons) - 1:,} more)" if len(reasons) > 1 else "")


def _require_absent(folder: Path) -> None:
    """Refuse to write into, and later to remove, what is not ours.

    Raises:
        OutputError: if there is such a folder or file.
    """
    with disk_errors(folder):
        if folder.exists() or folder.is_symlink():
            raise OutputError(f"{folder}: exists, expected nothing there", hint="Choose another work folder.")


def _remove(folder: Path) -> None:
    """Remove a copy; its links only, not the files that they share with the originals.

    Raises:
        OutputError: if it cannot be removed.
    """
    with disk_errors(folder):
        if folder.exists():
            shutil.rmtree(folder)
