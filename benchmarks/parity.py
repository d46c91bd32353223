"""How long does it take to compare two checkpoints of full-size Flash layers, and how much memory?

Four layers (window, window, CSA, HCA) with embedding, head and MTP block, native against its fp8 conversion, 1,024
tokens, the noise floor included: the reference goes through each layer five times, the candidate once or twice. Beside
each layer's time stands what plain reading of both sides' bytes of it takes, in one thread, just before.

The extrapolation to 43 layers (Flash) takes the times of this run by kind of layer, and head and MTP as they are; that
to 61 layers (Pro) multiplies every time by how many more bytes a Pro layer has. Both rest on the layers being alike
within a kind, on the prompt being 1,024 tokens, and for Pro on time growing with bytes.

    python benchmarks/parity.py [--tokens N] [--folder DIR] [--source NATIVE FP8] [--tiny]

writes benchmarks/results/parity.csv; the checkpoints that it makes take 57 GB of disk.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from _child import run
from _results import environment, write_csv
from convert import write_source

LAYERS = 4
# Layers of each kind in the releases: compress_ratios of their configs.
FLASH = {"window": 2, "csa": 21, "hca": 20}
PRO = {"window": 0, "csa": 30, "hca": 31}
MEMORY_LIMIT_GIB = 4

READ = """
import sys
sys.path.insert(0, {benchmarks!r})
from _forward_side import seconds_to_read
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.checkpoint.weights import Weights
from pathlib import Path
sources = [Weights(open_checkpoint(Path(path))) for path in {paths!r}]
print([sum(seconds_to_read(weights, f"layers.{{layer}}.") for weights in sources) for layer in range({layers})])
"""


def read_seconds(paths: list[str]) -> list[float]:
    """Seconds that plain reading of each layer of both checkpoints takes."""
    code = READ.format(benchmarks=str(Path(__file__).parent), paths=paths, layers=LAYERS)
    found: list[float] = json.loads(run([sys.executable, "-c", code]).stdout)
    return found


def blocks(result: dict[str, Any], reading: list[float]) -> list[dict[str, object]]:
    """A row for each layer."""
    evidence = result["evidence"]
    return [
        {
            "block": f"layer {layer['layer']}",
            "kind": layer["kind"],
            "seconds": f"{seconds:.2f}",
            "bytes_read": bytes_read,
            "plain_read_seconds": f"{read:.2f}",
            "seconds_over_plain_read": f"{seconds / read:.2f}",
        }
        for layer, seconds, bytes_read, read in zip(
            result["layers"], evidence["layer_seconds"], evidence["layer_bytes_read"], reading, strict=False
        )
    ]


def extrapolate(result: dict[str, Any], bytes_a_pro_layer: float) -> dict[str, float]:
    """Seconds for all layers of Flash and of Pro."""
    evidence = result["evidence"]
    times: dict[str, list[float]] = {}
    for layer, seconds in zip(result["layers"], evidence["layer_seconds"], strict=False):
        times.setdefault(layer["kind"], []).append(seconds)
    mean = {kind: sum(values) / len(values) for kind, values in times.items()}
    rest = evidence["seconds"] - sum(evidence["layer_seconds"][:LAYERS])
    return {
        "flash": sum(count * mean[kind] for kind, count in FLASH.items()) + rest,
        "pro": bytes_a_pro_layer * (sum(count * mean.get(kind, 0.0) for kind, count in PRO.items()) + rest),
    }


def pro_over_flash() -> float:
    """Bytes of a Pro layer over those of a Flash layer, native, from the headers that a synthetic one would have."""
    sizes = {}
    for like in ("flash", "pro"):
        one, two = (
            json.loads(run(["v4quant", "synth", "x", "--like", like, "--layers", n, "--dry-run", "--json"]).stdout)
            for n in ("3", "4")
        )
        sizes[like] = two["bytes"] - one["bytes"]
    return float(sizes["pro"] / sizes["flash"])


def main() -> None:
    """Measure, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in all")
    parser.add_argument("--folder", type=Path, help="folder for the checkpoints; default: the temporary one")
    parser.add_argument("--source", nargs=2, help="a native checkpoint of four layers and its fp8 conversion")
    parser.add_argument("--tiny", action="store_true", help="small dimensions, to try this script out; no CSV")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="v4quant-benchmark-", dir=arguments.folder) as name:
        if arguments.source:
            native, fp8 = arguments.source
        else:
            native, fp8 = str(write_source(Path(name), LAYERS, tiny=arguments.tiny)), str(Path(name) / "fp8")
            run(["v4quant", "convert", native, fp8, "--to", "fp8"])
        reading = read_seconds([native, fp8])
        child = run(["v4quant", "parity", fp8, "--against", native, "--length", str(arguments.tokens), "--json"])
    result = json.loads(child.stdout)
    rows = blocks(result, reading)
    for row in rows:
        print(
            f"{row['block']} {row['kind']:6}  {row['seconds']} s, plain reading of its {row['bytes_read']:,} bytes "
            f"{row['plain_read_seconds']} s: {row['seconds_over_plain_read']}"
        )
    whole = extrapolate(result, 1.0 if arguments.tiny else pro_over_flash())
    peak = child.peak_bytes / 2**30
    print(f"{result['verdict']}; {child.seconds:.1f} s in all; peak memory {peak:.2f} GiB (limit {MEMORY_LIMIT_GIB})")
    print(f"all 43 layers of Flash: about {whole['flash'] / 60:.0f} minutes; all 61 of Pro: {whole['pro'] / 60:.0f}")
    if not arguments.tiny:
        common = {
            "verdict": result["verdict"],
            "tokens": arguments.tokens,
            "all_seconds": f"{child.seconds:.1f}",
            "peak_mib": f"{child.peak_bytes / 2**20:.0f}",
            "flash_43_layers_minutes": f"{whole['flash'] / 60:.1f}",
            "pro_61_layers_minutes": f"{whole['pro'] / 60:.1f}",
            **environment("v4quant", "torch"),
        }
        write_csv("parity", rows, common)


if __name__ == "__main__":
    main()
