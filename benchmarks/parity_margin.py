"""Does the margin of `v4quant parity` part noise from damage?

Noise: the reference checkpoints of the test data and tiny synthetic ones, run against themselves with coded products,
whose FP32 sums of 128 columns are scaled and added as in the released code, where the reference multiplies decoded
operands. Nothing differs but the order of sums, and it is none of the orders that the floor is made of. Damage: the
same checkpoints with one tensor changed in one layer. Each run is told by its largest figure as a share of the limit:
up to 1 is `indistinguishable`, above 1 `different`.

    python benchmarks/parity_margin.py [--seeds N] [--checkpoint DIR]...

writes benchmarks/results/parity_margin.csv.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _results import environment, write_csv

from v4quant.checkpoint.reader import open_checkpoint
from v4quant.model.arithmetic import Arithmetic, Products
from v4quant.model.streaming import StreamedModel
from v4quant.parity.lockstep import Lockstep, Outcome
from v4quant.parity.prompts import built_prompts
from v4quant.parity.reference import Alongside
from v4quant.parity.verdict import block_figures, blocks_of, judge, logit_figures
from v4quant.testing.releases import synth_config
from v4quant.testing.synth import write_checkpoint

RELEASES = ("flash", "pro", "flash-base", "pro-base")
REFERENCES = Path(__file__).parents[1] / "tests" / "data" / "reference"


def negate(values: torch.Tensor) -> None:
    """Lose the sign."""
    values.neg_()


def clear(values: torch.Tensor) -> None:
    """Lose the values."""
    values.zero_()


# What is damaged, in the last layer that has it, and how.
DAMAGES: dict[str, tuple[str, Callable[[torch.Tensor], object]]] = {
    "attn_sink zeroed": ("attn.attn_sink", clear),
    "ffn_norm one value negated": ("ffn_norm.weight", lambda values: negate(values[:1])),
    "ffn_norm one percent larger": ("ffn_norm.weight", lambda values: values.mul_(1.01)),
    "ffn_norm a tenth larger": ("ffn_norm.weight", lambda values: values.mul_(1.1)),
    "hc_ffn_base zeroed": ("hc_ffn_base", clear),
    "router rows exchanged": ("ffn.gate.weight", lambda values: values.copy_(values.roll(1, 0))),
    "kv_norm a tenth larger": ("attn.kv_norm.weight", lambda values: values.mul_(1.1)),
    "compressor ape zeroed": ("attn.compressor.ape", clear),
    "indexer weights negated": ("attn.indexer.weights_proj.weight", negate),
}


def damage(folder: Path, local: str, change: Callable[[torch.Tensor], object]) -> bool:
    """Change a tensor in place, in the last layer that has it; False where none has."""
    checkpoint = open_checkpoint(folder)
    held = [entry for name, entry in checkpoint.tensors.items() if name.partition(".")[2].partition(".")[2] == local]
    held = [entry for entry in held if entry.name.startswith("layers.")]
    if not held:
        return False
    entry = sorted(held, key=lambda entry: entry.name)[-1]
    with (folder / entry.file).open("r+b") as file:
        file.seek(entry.start)
        data = bytearray(file.read(entry.bytes))
        change(
            torch.frombuffer(data, dtype={"BF16": torch.bfloat16, "F32": torch.float32}[entry.dtype]).view(entry.shape)
        )
        file.seek(entry.start)
        file.write(data)
    return True


def share(candidate: Path, reference: Path, products: Products) -> tuple[float, str, Outcome]:
    """The largest figure as a share of its limit, and which it is."""
    theirs = open_checkpoint(reference)
    with (
        StreamedModel(open_checkpoint(candidate), Arithmetic(products=products)) as model,
        StreamedModel(theirs, Arithmetic()) as other,
    ):
        outcome = Lockstep(model, Alongside(other), built_prompts(theirs.config, None, None)).run()
    limits = judge(outcome).limits
    found = {}
    for block in blocks_of(outcome):
        assert block.isolated is not None
        for figure, value in block_figures(block.isolated).items():
            found[f"{figure} of {block.name}"] = value / limits[figure]
    for name, logits in (("logits", outcome.logits), ("mtp_logits", outcome.mtp_logits)):
        if logits is not None:
            for figure, value in logit_figures(logits.found).items():
                found[f"{figure} of {name}"] = value / limits[f"{name} {figure}"]
    last = outcome.layers[-1].accumulated
    assert last is not None
    found["accumulated_rel_err"] = last.streams.rel_err / limits["accumulated_rel_err"]
    worst = max(found, key=lambda key: found[key])
    return found[worst], worst, outcome


def rows_of(name: str, source: Path, folder: Path) -> list[dict[str, object]]:
    """All runs of one checkpoint."""
    changed = folder / "changed"
    runs: list[tuple[str, str, tuple[float, str, Outcome]]] = [
        ("noise", "coded products", share(source, source, Products.CODED))
    ]
    for what, (local, change) in DAMAGES.items():
        shutil.copytree(source, changed)
        for path in changed.iterdir():
            path.chmod(0o755 if path.is_dir() else 0o644)
        if damage(changed, local, change):
            runs.append(("damage", what, share(changed, source, Products.DECODED)))
        shutil.rmtree(changed)
    rows: list[dict[str, object]] = []
    for kind, what, (found, figure, outcome) in runs:
        assert outcome.logits is not None
        kl, floor = outcome.logits.found.kl.mean, max(own.kl.mean for own in outcome.logits.noise.values())
        row: dict[str, object] = {"checkpoint": name, "kind": kind, "what": what}
        row |= {"largest_share_of_limit": f"{found:.3f}", "figure": figure}
        rows.append(row | {"kl_mean": f"{kl:.3g}", "kl_floor": f"{floor:.3g}"})
        print(f"{name:14}  {kind:6}  {what:28} {found:8.2f}  {figure}", flush=True)
    return rows


def main() -> None:
    """Measure, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="synthetic checkpoints of each release")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="another checkpoint")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="v4quant-benchmark-") as name:
        for source in [*sorted(REFERENCES.iterdir()), *arguments.checkpoint]:
            rows += rows_of(source.name, source, Path(name))
        for release in RELEASES:
            for seed in range(arguments.seeds):
                source = Path(name) / "source"
                write_checkpoint(source, *synth_config(release, tiny=True), seed=seed)
                rows += rows_of(f"{release} {seed}", source, Path(name))
                shutil.rmtree(source)
    write_csv("parity_margin", rows, environment("v4quant", "torch"))


if __name__ == "__main__":
    main()
