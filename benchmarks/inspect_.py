"""How long does `v4quant inspect` take on a release's headers, against reading them with safetensors, in the same run?

Full-size checkpoints of which only headers, index and config are real: the data are holes in sparse files. Flash has
69,187 tensors in 46 files, Pro-0813 149,782 in 66. Each round times whole processes, from Python's start to its exit:
`python -c "import typer"` (what any command line costs), safetensors.safe_open of all files without torch (which does
not compare them with index, config or each other), and `inspect`. A row holds medians over rounds, headers cached.

    python benchmarks/inspect_.py [--rounds N]     writes benchmarks/results/inspect.csv

The underscore is there because a script's folder comes first on Python's path, and the standard library has an inspect.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from pathlib import Path

from _child import Child, run, v4quant
from _results import environment, write_csv

RELEASES = ("flash", "pro-0813")
IMPORT_TYPER = "import typer"
# Numpy is the lightest framework that safe_open offers.
SAFE_OPEN = """
import pathlib, sys
from safetensors import safe_open
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, framework="numpy") as file:
        file.keys()
assert "torch" not in sys.modules
"""


def write_headers(folder: Path, release: str) -> None:
    """Write everything of a release but its data."""
    from v4quant.testing.releases import synth_config
    from v4quant.testing.synth import plan_synth

    plan = plan_synth(*synth_config(release))
    for shard in plan.shards:
        path = folder / shard.name
        path.write_bytes(shard.header)
        os.truncate(path, shard.file_bytes)
    for name, data in plan.side_files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


def write_headers_apart(folder: Path, release: str) -> None:
    """Do so in a process of its own, because this one has to stay small (see _child.py)."""
    process = multiprocessing.get_context("spawn").Process(target=write_headers, args=(folder, release))
    process.start()
    process.join()
    if process.exitcode != 0:
        sys.exit(f"could not write the headers of {release}")


def measure(folder: Path, rounds: int) -> dict[str, list[Child]]:
    """Time inspect and its baselines, one after the other in every round; a first round is not counted."""
    measured: dict[str, list[Child]] = {"import typer": [], "safe_open": [], "inspect": []}
    for number in range(rounds + 1):
        found = {
            "import typer": run([sys.executable, "-c", IMPORT_TYPER]),
            "safe_open": run([sys.executable, "-c", SAFE_OPEN, str(folder)]),
            "inspect": v4quant("inspect", folder, "--json"),
        }
        if number:
            for name, child in found.items():
                measured[name].append(child)
    return measured


def rows_of(release: str, measured: dict[str, list[Child]]) -> list[dict[str, object]]:
    """One row a command: medians, and how many times as long inspect takes."""
    seconds = {name: statistics.median(child.seconds for child in children) for name, children in measured.items()}
    tensors = json.loads(measured["inspect"][0].stdout)["tensors"]
    return [
        {
            "release": release,
            "tensors": tensors,
            "command": name,
            "seconds": f"{seconds[name]:.3f}",
            "inspect_over_this": f"{seconds['inspect'] / seconds[name]:.2f}",
            "peak_memory_mib": f"{max(child.peak_bytes for child in children) / 2**20:.0f}",
            "rounds": len(children),
        }
        for name, children in measured.items()
    ]


def main() -> None:
    """Measure, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take medians over")
    rounds = parser.parse_args().rounds
    rows: list[dict[str, object]] = []
    for release in RELEASES:
        with tempfile.TemporaryDirectory(prefix="v4quant-benchmark-") as folder:
            write_headers_apart(Path(folder), release)
            of_release = rows_of(release, measure(Path(folder), rounds))
        for row in of_release:
            print(
                f"{release:<10}{row['tensors']:>8,} tensors  {row['command']:<13}{row['seconds']:>7} s  "
                f"{row['peak_memory_mib']:>4} MiB   inspect takes {row['inspect_over_this']} times as long"
            )
        rows += of_release
    write_csv("inspect", rows, environment("v4quant", "safetensors", "typer"))


if __name__ == "__main__":
    main()
