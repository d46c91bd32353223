"""How long does `v4quant convert` take against `cp` of the bytes that it writes, and does its memory grow with layers?

The source is a synthetic checkpoint with one full-size Flash layer (and embedding, head and MTP block: 9.3 GB). A round
times both on the same disk: `convert` from Python's start to its exit, and `cp -r` of its output. Files and folders are
fsynced within the timed part; before it dirty pages are written back and, where permitted, the page cache is dropped.
Every other round copies first. Then the peak memory is measured again with one layer more, without a copy. Numba's
compiled code is on disk before anything is timed.

    python benchmarks/convert.py [--layers N] [--rounds N] [--memory-layers N] [--folder DIR] [--tiny]

writes benchmarks/results/convert.csv; it needs room for the source and twice the BF16 output, 66 GB for one layer.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _child import Child, v4quant
from _results import environment, write_csv

TARGETS = ("fp8", "bf16")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass
class Measured:
    """One source and target: seconds of every round, and what the last conversion said."""

    target: str
    layers: int
    convert_seconds: list[float] = field(default_factory=list)
    cp_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    report: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, object]:
        """Medians, their ratio, and gigabytes written a second."""
        written, ours = self.report["bytes_written"], statistics.median(self.convert_seconds)
        cp = statistics.median(self.cp_seconds) if self.cp_seconds else None
        return {
            "layers": self.layers,
            "target": self.target,
            "bytes_read": self.report["bytes_read"],
            "bytes_written": written,
            "rounds": len(self.convert_seconds),
            "convert_seconds": f"{ours:.2f}",
            "cp_seconds": f"{cp:.2f}" if cp else "",
            "convert_over_cp": f"{ours / cp:.3f}" if cp else "",
            "convert_gb_per_s": f"{written / ours / 1e9:.2f}",
            "cp_gb_per_s": f"{written / cp / 1e9:.2f}" if cp else "",
            "convert_rounds": " ".join(f"{seconds:.2f}" for seconds in self.convert_seconds),
            "cp_rounds": " ".join(f"{seconds:.2f}" for seconds in self.cp_seconds),
            "peak_memory_mib": f"{self.peak_bytes / 2**20:.0f}",
        }


def settle() -> bool:
    """Write back what is dirty and forget what is cached; False where the latter is not permitted."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n")
    except OSError:
        return False
    return True


def fsync_all(folder: Path) -> None:
    """Make a folder durable, everything in it first."""
    for path in [*sorted(folder.rglob("*")), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def timed(job: Callable[[], object], folder: Path) -> float:
    """Seconds that a job takes until what it wrote into folder is on the disk."""
    settle()
    start = time.perf_counter()
    job()
    fsync_all(folder)
    return time.perf_counter() - start


def require_space(folder: Path, needed_bytes: int) -> None:
    """Exit before a round that the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        sys.exit(f"{needed_bytes:,} bytes are needed, {free:,} are free; choose another --folder")


def write_source(folder: Path, layers: int, *, tiny: bool) -> Path:
    """Write a synthetic Flash checkpoint of so many layers, in place of an earlier one."""
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    command = ["synth", source, "--like", "flash", "--layers", layers, "--json", *(["--tiny"] if tiny else [])]
    require_space(folder, json.loads(v4quant(*command, "--dry-run").stdout)["disk_bytes"])
    v4quant(*command)
    return source


def run_round(folder: Path, source: Path, measured: Measured, *, copy: bool, copy_first: bool) -> None:
    """Convert once and, on request, copy the output once; the output stays, the copy does not."""
    out, copied = folder / "out", folder / "copied"

    def convert() -> None:
        shutil.rmtree(out, ignore_errors=True)
        done: list[Child] = []
        command = ("convert", source, out, "--to", measured.target, "--json")
        measured.convert_seconds.append(timed(lambda: done.append(v4quant(*command)), out))
        measured.peak_bytes = max(measured.peak_bytes, done[0].peak_bytes)
        measured.report = json.loads(done[0].stdout)

    def cp() -> None:
        job = ["cp", "-r", str(out), str(copied)]
        measured.cp_seconds.append(timed(lambda: subprocess.run(job, check=True), copied))
        shutil.rmtree(copied)

    jobs = [convert, cp] if copy else [convert]
    for job in reversed(jobs) if copy_first else jobs:
        job()


def measure(folder: Path, source: Path, layers: int, target: str, *, rounds: int, copy: bool) -> Measured:
    """Run all rounds of one source and target."""
    measured = Measured(target, layers)
    planned = json.loads(v4quant("convert", source, folder / "out", "--to", target, "--dry-run", "--json").stdout)
    require_space(folder, planned["disk_bytes"] * (2 if copy else 1))
    for number in range(rounds):
        run_round(folder, source, measured, copy=copy, copy_first=number % 2 == 1)
    shutil.rmtree(folder / "out")
    return measured


def warm_up(folder: Path) -> None:
    """Have numba compile, outside of what is measured, whatever it has not compiled on this machine before."""
    source = write_source(folder, 1, tiny=True)
    for target in TARGETS:
        v4quant("convert", source, folder / "out", "--to", target)
        shutil.rmtree(folder / "out")


def describe(measured: Measured, peak_before: int | None) -> str:
    """Write one line of the table."""
    row = measured.row()
    line = f"native -> {measured.target}, layers: {measured.layers}, peak {measured.peak_bytes / 2**20:4.0f} MiB"
    if peak_before:
        line += f", {measured.peak_bytes / peak_before:.3f} of the peak above"
    if measured.cp_seconds:
        line += (
            f", {row['convert_seconds']} s ({row['convert_gb_per_s']} GB/s), cp {row['cp_seconds']} s "
            f"({row['cp_gb_per_s']} GB/s): {row['convert_over_cp']} of cp"
        )
    return line


def main() -> None:
    """Measure, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="layers of the checkpoint that is timed")
    parser.add_argument("--rounds", type=int, default=3, help="rounds to take medians over")
    parser.add_argument("--memory-layers", type=int, default=2, help="layers to compare the memory with; 0: do not")
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; default: the temporary one")
    parser.add_argument("--tiny", action="store_true", help="small dimensions, to try this script out; no CSV")
    arguments = parser.parse_args()
    results: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="v4quant-benchmark-", dir=arguments.folder) as name:
        folder = Path(name)
        warm_up(folder)
        dropped = settle()
        print("dirty pages written back before each timed part, page cache " + ("dropped" if dropped else "kept"))
        plan = [(arguments.layers, arguments.rounds, True), (arguments.memory_layers, 1, False)]
        for layers, rounds, copy in plan[: 2 if arguments.memory_layers else 1]:
            source = write_source(folder, layers, tiny=arguments.tiny)
            for target in TARGETS:
                measured = measure(folder, source, layers, target, rounds=rounds, copy=copy)
                earlier = next((r.peak_bytes for r in results if r.target == target), None)
                print(describe(measured, earlier), flush=True)
                results.append(measured)
    if not arguments.tiny:
        common = {"cache_dropped": dropped, **environment("v4quant", "numpy", "numba")}
        write_csv("convert", [measured.row() for measured in results], common)


if __name__ == "__main__":
    main()
