"""What a benchmark's CSV says about the machine and the versions that it ran on, and where it goes."""

import csv
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def environment(*packages: str) -> dict[str, object]:
    """Columns that every row ends with: processor, logical cores, system, versions, date.

    Args:
        packages: distributions whose version matters.
    """
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def write_csv(name: str, rows: Sequence[Mapping[str, object]], common: Mapping[str, object]) -> None:
    """Write results/NAME.csv anew.

    Args:
        rows: one a line, all with the same keys.
        common: columns that are the same in every row, put last.
    """
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *common], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
