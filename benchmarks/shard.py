"""How long do `v4quant shard` and `merge` take against `cp` of the bytes that they write, and in how much memory?

The source is a synthetic checkpoint with two full-size Flash layers (and embedding, head and MTP block: 12.9 GB), cut
into every number of ranks that Flash allows, with FP8 experts, and into folders of a grid. A round times, on the same
disk and from Python's start to its exit, `shard`, `merge` of what it wrote, and `cp -r` of both outputs; files and
folders are fsynced within the timed part. Every other round copies first. That the merged files are the source's is
checked in each round.

    python benchmarks/shard.py [--layers N] [--rounds N] [--folder DIR] [--tiny]

writes benchmarks/results/shard.csv; it needs room for five times the source, 65 GB for two layers.
"""

import argparse
import filecmp
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _child import Child, v4quant
from _results import environment, write_csv
from convert import require_space, settle, timed, write_source

# What is measured, by the options of shard.
JOBS = ["--tp 2", "--tp 4", "--tp 8", "--tp 8 --experts fp8", "--tp 2 --ep 4"]
TINY_JOBS = ["--tp 2", "--tp 2 --experts fp8", "--tp 1 --ep 2"]


@dataclass
class Measured:
    """One command: seconds of every round, and what its last run said."""

    command: str
    seconds: list[float] = field(default_factory=list)
    cp_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    report: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, object]:
        """Medians, their ratio, and gigabytes written a second."""
        ours, cp = statistics.median(self.seconds), statistics.median(self.cp_seconds)
        written = self.report["bytes_written"]
        return {
            "command": self.command,
            "ranks": self.report["ranks"],
            "tensors": self.report["tensors"],
            "bytes_written": written,
            "rounds": len(self.seconds),
            "seconds": f"{ours:.2f}",
            "cp_seconds": f"{cp:.2f}",
            "over_cp": f"{ours / cp:.3f}",
            "gb_per_s": f"{written / ours / 1e9:.2f}",
            "all_seconds": " ".join(f"{seconds:.2f}" for seconds in self.seconds),
            "all_cp_seconds": " ".join(f"{seconds:.2f}" for seconds in self.cp_seconds),
            "peak_memory_mib": f"{self.peak_bytes / 2**20:.0f}",
        }

    def describe(self) -> str:
        """Write one line of the table."""
        row = self.row()
        return (
            f"{self.command}: {row['seconds']} s ({row['gb_per_s']} GB/s), cp {row['cp_seconds']} s: "
            f"{row['over_cp']} of cp, peak {row['peak_memory_mib']} MiB"
        )


def run_side(measured: Measured, out: Path, command: list[object], *, copy_first: bool) -> None:
    """Run a command once and copy its output once; the output stays, the copy does not."""
    copied = out.with_name("copied")

    def ours() -> None:
        shutil.rmtree(out, ignore_errors=True)
        done: list[Child] = []
        measured.seconds.append(timed(lambda: done.append(v4quant(*command, "--json")), out))
        measured.peak_bytes = max(measured.peak_bytes, done[0].peak_bytes)
        measured.report = json.loads(done[0].stdout)

    def cp() -> None:
        job = ["cp", "-r", str(out), str(copied)]
        measured.cp_seconds.append(timed(lambda: subprocess.run(job, check=True), copied))
        shutil.rmtree(copied)

    jobs: list[Callable[[], None]] = [ours, cp]
    for job in reversed(jobs) if copy_first and out.exists() else jobs:
        job()


def require_same(source: Path, merged: Path) -> None:
    """Exit where a merged file is not the source's."""
    names = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
    _, differing, missing = filecmp.cmpfiles(source, merged, names, shallow=False)
    if differing or missing:
        sys.exit(f"merged files differ: {differing + missing}")


def measure(folder: Path, source: Path, options: str, rounds: int) -> list[Measured]:
    """Run all rounds of one way to shard, and of the way back."""
    sharded, merged = folder / "sharded", folder / "merged"
    there, back = Measured(f"shard {options}"), Measured(f"merge of {options}")
    command = ["shard", source, sharded, *options.split()]
    require_space(folder, 2 * json.loads(v4quant(*command, "--dry-run", "--json").stdout)["disk_bytes"])
    for number in range(rounds):
        run_side(there, sharded, command, copy_first=number % 2 == 1)
        run_side(back, merged, ["merge", sharded, merged], copy_first=number % 2 == 1)
        require_same(source, merged)
    shutil.rmtree(sharded)
    shutil.rmtree(merged)
    return [there, back]


def main() -> None:
    """Measure, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="layers of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to take medians over")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; default: the temporary one")
    parser.add_argument("--tiny", action="store_true", help="small dimensions and two ranks, to try it out; no CSV")
    arguments = parser.parse_args()
    results: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="v4quant-benchmark-", dir=arguments.folder) as name:
        folder = Path(name)
        for job in TINY_JOBS:  # whatever numba has not compiled on this machine before it compiles here
            measure(folder, write_source(folder, 1, tiny=True), job, 1)
        dropped = settle()
        print("dirty pages written back before each timed part, page cache " + ("dropped" if dropped else "kept"))
        source = write_source(folder, arguments.layers, tiny=arguments.tiny)
        for job in TINY_JOBS if arguments.tiny else JOBS:
            for measured in measure(folder, source, job, arguments.rounds):
                print(measured.describe(), flush=True)
                results.append(measured)
    if not arguments.tiny:
        common = {"layers": arguments.layers, "cache_dropped": dropped, **environment("v4quant", "numpy", "numba")}
        write_csv("shard", [measured.row() for measured in results], common)


if __name__ == "__main__":
    main()
