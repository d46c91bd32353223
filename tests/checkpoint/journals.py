"""What the journal of an unfinished run says."""

import json
from pathlib import Path

from v4quant.checkpoint.reader import JOURNAL_NAME


def finished(out: Path) -> dict[str, list[int]]:
    """Inode and time of last change of the shards that the journal calls finished."""
    journal = out / JOURNAL_NAME
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    names = [json.loads(line)["finished"] for line in lines if line.startswith(b'{"finished"')]
    return {name: [(out / name).stat().st_ino, (out / name).stat().st_mtime_ns] for name in names}
