"""The output folder of a run that may be killed and continued: made ready, locked, and left tidy.

A run is what its journal's first line says: a plan and what the source looked like. The same command finds that line
again and continues; another one is refused, or replaces everything with --overwrite.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from v4quant.checkpoint.journal import Journal, JournalHeader, lock_journal
from v4quant.checkpoint.output import PARTIAL_SUFFIX, RANK_FOLDERS, disk_errors, make_room, require_free
from v4quant.checkpoint.reader import JOURNAL_NAME
from v4quant.errors import OutputError

STATE_FOLDER = ".v4quant"  # hidden: what a run keeps for the next one beside its journal


def open_run(
    out: Path, header: JournalHeader, disk_bytes: int, *, overwrite: bool, resume: Callable[[Journal], None]
) -> Journal:
    """Make an output folder ready, and begin or continue its journal.

    Args:
        out: folder to write; made if missing.
        header: what this run is.
        disk_bytes: what the whole output will take.
        overwrite: replace what out holds.
        resume: called with the journal of a run that continues; may strike finished shards, and refuse.

    Raises:
        CheckpointError: if the source changed since the run began.
        OutputError: if out is in use or not free, or the disk is too small or refuses.
    """
    with disk_errors(out):
        is_unfinished = (out / JOURNAL_NAME).is_file()
        if not is_unfinished:
            require_free(out, overwrite=overwrite)
        out.mkdir(parents=True, exist_ok=True)
    # Whatever is removed is removed under the lock, so that two runs cannot take each other's files.
    journal = lock_journal(out)
    try:
        found = journal.header()
        if found is not None and (not overwrite or header.is_same_run(found)):
            journal.resume(header)
            resume(journal)
        else:
            require_free(out, overwrite=overwrite, keep=JOURNAL_NAME)
            make_room(out, disk_bytes, keep=JOURNAL_NAME)
            journal.begin(header)
    except BaseException:
        if is_unfinished:
            journal.close()
        else:
            forget(journal, out)
        raise
    return journal


def forget(journal: Journal, out: Path) -> None:
    """Nothing is worth continuing, so nothing is left behind."""
    journal.remove()
    for folder in (*out.glob(RANK_FOLDERS), out):
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()


def holds_work(out: Path) -> bool:
    """True if an output folder holds something of an unfinished run that the next one can use."""
    notes = (path for path in out.glob("v4quant.*") if path.name != JOURNAL_NAME)
    return any(out.glob("*.safetensors")) or any(notes) or (out / STATE_FOLDER).is_dir()


def require_apart(out: Path, folders: Iterable[str]) -> None:
    """Refuse an output folder that is, holds or lies in a folder that is read.

    Raises:
        OutputError: if it does.
    """
    for folder in folders:
        theirs, ours = (Path(os.path.realpath(path)) for path in (folder, out))
        if theirs == ours or theirs in ours.parents or ours in theirs.parents:
            raise OutputError(
                f"{out}: overlaps with the checkpoint that is read, {folder}", hint="Choose a folder beside it."
            )


def is_there(path: Path, file_bytes: int) -> bool:
    """True if a file has its full size."""
    return path.is_file() and path.stat().st_size == file_bytes


def remove_partial_files(out: Path) -> None:
    """Remove what this run, or one that was killed, left unfinished."""
    for pattern in (f"*{PARTIAL_SUFFIX}", f"{RANK_FOLDERS}/*{PARTIAL_SUFFIX}"):
        for left_over in out.glob(pattern):
            with contextlib.suppress(OSError):
                left_over.unlink()
