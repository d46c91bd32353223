"""How long does a full-size Flash layer take, streamed from the checkpoint, against transformers' layer in memory?

One layer of each kind (window, CSA, HCA), 1,024 tokens, two threads. Ours decodes and rounds as DeepSeek's inference
code does and reads every weight within the timed part, dense ones first, then the experts that the router picked.
Transformers' `DeepseekV4DecoderLayer` has its 13 GB of weights in memory, in BF16, before anything is timed. Each side
runs in a process of its own, sides take turns, every other round the other one begins. A process takes the tokens
through its layer three times and the last is what counts: buffers are there and code is compiled, as in the middle of
a model. Memory is the peak of the process, from Python's start to its end.

Large reads go past the page cache but take from it what it holds; the script neither fills nor empties it, so what a
disk or a host's cache gives is what there is. `read_gb_per_s` is what plain reading of the layer gives just before.

    python benchmarks/forward.py [--rounds N] [--tokens N] [--folder DIR] [--source CHECKPOINT] [--tiny]

writes benchmarks/results/forward.csv; the checkpoint that it makes takes 20 GB of disk, transformers 15 GB of memory.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _child import run
from _results import environment, write_csv
from convert import write_source

SIDE = Path(__file__).parent / "_forward_side.py"
PASSES = 3
# Layers of Flash that show each kind, and their ratio.
KINDS = {"window": (0, 0), "csa": (2, 4), "hca": (3, 128)}
LAYERS = 4


@dataclass
class Measured:
    """One kind of layer: what every round said of both sides."""

    kind: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "theirs": []})
    cpu_seconds: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "theirs": []})
    peak_bytes: dict[str, int] = field(default_factory=lambda: {"ours": 0, "theirs": 0})
    said: dict[str, Any] = field(default_factory=dict)

    def run(self, side: str, source: Path, tokens: int) -> None:
        """One process of one side."""
        layer, _ = KINDS[self.kind]
        child = run([sys.executable, str(SIDE), side, str(source), str(layer), str(tokens), str(PASSES)])
        said = json.loads(child.stdout)
        self.seconds[side].append(said["seconds"][-1])
        self.cpu_seconds[side].append(said["cpu_seconds"][-1])
        self.peak_bytes[side] = max(self.peak_bytes[side], child.peak_bytes)
        self.said[side] = said

    def row(self) -> dict[str, object]:
        """Medians and ratios."""
        ours, theirs = (statistics.median(self.seconds[side]) for side in ("ours", "theirs"))
        ours_cpu, theirs_cpu = (statistics.median(self.cpu_seconds[side]) for side in ("ours", "theirs"))
        return {
            "layer": self.kind,
            "rounds": len(self.seconds["ours"]),
            "ours_seconds": f"{ours:.2f}",
            "theirs_seconds": f"{theirs:.2f}",
            "time_ours_over_theirs": f"{ours / theirs:.3f}",
            "ours_cpu_seconds": f"{ours_cpu:.2f}",
            "theirs_cpu_seconds": f"{theirs_cpu:.2f}",
            "ours_peak_mib": f"{self.peak_bytes['ours'] / 2**20:.0f}",
            "theirs_peak_mib": f"{self.peak_bytes['theirs'] / 2**20:.0f}",
            "peak_ours_over_theirs": f"{self.peak_bytes['ours'] / self.peak_bytes['theirs']:.3f}",
            "ours_experts": self.said["ours"]["experts"],
            "theirs_experts": self.said["theirs"]["experts"],
            "bytes_read": self.said["ours"]["bytes_read"],
            "read_gb_per_s": f"{self.said['ours']['bytes_read'] / self.said['ours']['read_seconds'] / 1e9:.2f}",
            "ours_rounds": " ".join(f"{seconds:.2f}" for seconds in self.seconds["ours"]),
            "theirs_rounds": " ".join(f"{seconds:.2f}" for seconds in self.seconds["theirs"]),
        }

    def describe(self) -> str:
        """One line of the table."""
        row = self.row()
        return (
            f"{self.kind:6}  {row['ours_seconds']} s against {row['theirs_seconds']} s: "
            f"{row['time_ours_over_theirs']} of the time (CPU {row['ours_cpu_seconds']} s, "
            f"{row['theirs_cpu_seconds']} s); peak {row['ours_peak_mib']} MiB against {row['theirs_peak_mib']} MiB: "
            f"{row['peak_ours_over_theirs']}; experts used: {row['ours_experts']}, {row['theirs_experts']}; "
            f"plain reading {row['read_gb_per_s']} GB/s"
        )


def main() -> None:
    """Measure, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds to take medians over")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--folder", type=Path, help="folder for the checkpoint; default: the temporary one")
    parser.add_argument("--source", type=Path, help="a Flash checkpoint of four layers or more, instead of a new one")
    parser.add_argument("--tiny", action="store_true", help="small dimensions, to try this script out; no CSV")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="v4quant-benchmark-", dir=arguments.folder) as name:
        source = arguments.source or write_source(Path(name), LAYERS, tiny=arguments.tiny)
        found = {kind: Measured(kind) for kind in KINDS}
        for kind, measured in found.items():
            for number in range(arguments.rounds):
                sides = ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours")
                for side in sides:
                    measured.run(side, source, arguments.tokens)
            print(found[kind].describe(), flush=True)
    if not arguments.tiny:
        common = {"tokens": arguments.tokens, "threads": 2, **environment("v4quant", "torch", "transformers")}
        write_csv("forward", [measured.row() for measured in found.values()], common)


if __name__ == "__main__":
    main()
