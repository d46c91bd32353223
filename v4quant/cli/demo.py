"""`v4quant demo`: the whole chain on a tiny synthetic checkpoint, each step proved, one fault planted and found."""

import filecmp
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from v4quant.cli._options import JsonMode
from v4quant.cli._output import Output, decimal_bytes, plural
from v4quant.errors import CheckFailedError, OutputError

if TYPE_CHECKING:
    from v4quant.checkpoint.reader import Checkpoint
    from v4quant.checkpoint.sharding.rank_tensors import Sharded
    from v4quant.checkpoint.verify_report import VerifyReport

_MARKER = "v4quant.demo"
_FOLDERS = ("native", "fp8", "bf16", "native-again", "damaged", "ranks", "merged", "report")


def demo(
    out: Annotated[Path, typer.Argument(metavar="[OUT]", help="Folder for the demo's checkpoints.")] = Path(
        "v4quant-demo"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in OUT.")] = False,
    json_mode: JsonMode = False,
) -> None:
    """Make a tiny checkpoint, convert, shard and merge it, prove the results, run them; a single flipped bit is found.

    \b
    v4quant demo
    v4quant demo /tmp/demo --overwrite
    """
    output = Output(json_mode)
    _clear(out, overwrite=overwrite)
    run = _Demo(out, output)
    run.synth()
    run.inspect()
    run.convert("fp8")
    run.convert("bf16")
    run.return_to_native()
    run.find_a_flipped_bit()
    run.shard_and_merge()
    run.parity_of_ranks()
    run.parity()
    output.result({"ok": run.ok, "steps": run.steps, "folder": str(out), "report": str(run.report)})
    if not run.ok:
        raise CheckFailedError(f"{out}: a step failed", hint="This is a defect of v4quant; please report it.")
    output.line(f"proved: {', '.join(step['proved'] for step in run.steps if step['proved'])}")
    output.line(f"report: {run.report}")
    output.note(f"next: v4quant selftest {out / 'native'}")


def _clear(out: Path, *, overwrite: bool) -> None:
    """Make the folder; of an earlier demo, and of nothing else, remove what it wrote.

    Raises:
        OutputError: if the folder holds something that no demo wrote, or overwrite is False.
    """
    from v4quant.checkpoint.output import disk_errors, require_free

    with disk_errors(out):
        is_demo = (out / _MARKER).is_file()
        is_used = out.is_dir() and any(out.iterdir())
    if overwrite and is_used and not is_demo:
        raise OutputError(
            f"{out}: holds what no demo wrote, expected an earlier demo, an empty folder or none",
            hint="Choose another folder for the demo.",
        )
    require_free(out, overwrite=overwrite)
    with disk_errors(out):
        for name in _FOLDERS:
            if (out / name).is_dir() and not (out / name).is_symlink():
                shutil.rmtree(out / name)
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARKER).write_text("Written by v4quant demo; --overwrite removes the folders beside this file.\n")


class _Demo:
    """The steps, and what came of them."""

    def __init__(self, out: Path, output: Output) -> None:
        self.steps: list[dict[str, Any]] = []
        self.report: Path | None = None
        self._out = out
        self._output = output

    @property
    def ok(self) -> bool:
        """True if every step so far was as it should be."""
        return all(step["ok"] for step in self.steps)

    def _note(self, step: str, ok: bool, text: str, proved: str = "") -> None:
        self.steps.append({"step": step, "ok": ok, "text": text, "proved": proved})
        self._output.line(f"{step:<28}{'ok ' if ok else 'NOT OK '} {text}")

    def synth(self) -> None:
        """Write the checkpoint that everything starts from."""
        from v4quant.testing.releases import synth_config
        from v4quant.testing.synth import write_checkpoint

        report = write_checkpoint(self._out / "native", *synth_config("flash", tiny=True))
        self._note("synth", True, f"{plural(report.tensors, 'tensor')}, {decimal_bytes(report.bytes)}, like Flash")

    def inspect(self) -> None:
        """Read its headers."""
        from v4quant.checkpoint.reader import open_checkpoint

        checkpoint = open_checkpoint(self._out / "native")
        text = f"stored as {checkpoint.scheme.name}, {plural(len(checkpoint.problems), 'problem')}"
        self._note("inspect", not checkpoint.problems, text)

    def convert(self, target: str) -> None:
        """Convert to another format, and compare every value with the original."""
        report = self._convert("native", target, self._out / target)
        verified = self._verify(target, "native")
        ok = verified.ok and not report["rounded"]
        text = f"{report['bit_identical']:,} tensors bit-identical, {report['value_exact']:,} value-exact"
        proved = f"{target} holds every value of the original"
        self._note(f"convert to {target}, verify", ok, text, proved)

    def return_to_native(self) -> None:
        """Go back from bf16, with the original's scales, and compare the files byte for byte."""
        self._convert("bf16", "native", self._out / "native-again", like=self._out / "native")
        self._compare_files("bf16 back to native", "native-again", "the way back is byte-identical")

    def shard_and_merge(self) -> None:
        """Cut into two tensor-parallel ranks, put them together again, and compare the files byte for byte."""
        from v4quant.checkpoint.reader import open_checkpoint
        from v4quant.checkpoint.sharding.folder import open_sharded
        from v4quant.checkpoint.sharding.grid import Grid
        from v4quant.checkpoint.sharding.merge import MergePlan, apply_merge
        from v4quant.checkpoint.sharding.shard import apply_shard, plan_shard

        apply_shard(plan_shard(open_checkpoint(self._out / "native"), Grid(2)), self._out / "ranks")
        apply_merge(MergePlan(open_sharded(self._out / "ranks")), self._out / "merged")
        self._compare_files("shard in two, merge", "merged", "two ranks give back every byte")

    def _compare_files(self, step: str, again: str, proved: str) -> None:
        """Every file of the original must be in another folder, byte for byte."""
        original = self._out / "native"
        names = sorted(path.relative_to(original).as_posix() for path in original.rglob("*") if path.is_file())
        _, differing, missing = filecmp.cmpfiles(original, self._out / again, names, shallow=False)
        text = f"{plural(len(names), 'file')} of the original, {len(differing) + len(missing)} of them different"
        self._note(step, not differing and not missing, text, proved)

    def find_a_flipped_bit(self) -> None:
        """Damage one bit of a weight in a copy; verify must name the tensor."""
        damaged = self._out / "damaged"
        shutil.copytree(self._out / "fp8", damaged)
        shard = sorted(damaged.glob("*.safetensors"))[1]
        with shard.open("r+b") as file:
            file.seek(-1, 2)
            byte = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([byte ^ 0x80]))
        found = self._verify("damaged", "native").mismatches
        text = f"{found[0].tensor}: {found[0].reason}" if found else "nothing was found"
        self._note("flip one bit, verify", len(found) == 1, text, "a single flipped bit is found and named")

    def parity(self) -> None:
        """Run the converted checkpoint beside the original, and write the report."""
        from v4quant.checkpoint.reader import open_checkpoint
        from v4quant.parity.report import write_report

        result = self._compare(open_checkpoint(self._out / "fp8"))
        self.report = write_report(result, self._out / "report")
        is_same = result["verdict"] == "identical"
        self._note("run both, parity", is_same, _found(result), "fp8 computes the same logits, bit by bit")

    def parity_of_ranks(self) -> None:
        """Run the two ranks beside the original, each on what it holds."""
        from v4quant.checkpoint.sharding.rank_tensors import open_ranks

        result = self._compare(open_ranks(self._out / "ranks"))
        ok = result["verdict"] in ("identical", "indistinguishable")
        self._note("run two ranks, parity", ok, _found(result), "two ranks together compute what one computes")

    def _compare(self, candidate: "Checkpoint | Sharded") -> dict[str, Any]:
        from v4quant.checkpoint.reader import open_checkpoint
        from v4quant.cli._memory import peak_memory_bytes
        from v4quant.parity.compare import Task, compare
        from v4quant.parity.prompts import built_prompts
        from v4quant.parity.result import to_json

        original = open_checkpoint(self._out / "native")
        task = Task(candidate, original, built_prompts(original.config, None, None))
        result = to_json(task, compare(task), [])
        result["evidence"]["peak_memory_bytes"] = peak_memory_bytes()
        return result

    def _convert(self, source: str, target: str, out: Path, like: Path | None = None) -> dict[str, int]:
        from v4quant.checkpoint.apply import apply
        from v4quant.checkpoint.certificate import verdict_counts
        from v4quant.checkpoint.plan import make_plan
        from v4quant.checkpoint.reader import open_checkpoint
        from v4quant.formats import format_named

        original = open_checkpoint(like) if like else None
        plan = make_plan(open_checkpoint(self._out / source), format_named(target), like=original)
        return verdict_counts(apply(plan, out).verdicts)

    def _verify(self, name: str, source: str) -> "VerifyReport":
        from v4quant.checkpoint.reader import open_checkpoint
        from v4quant.checkpoint.verify import verify_values

        checkpoint, original = open_checkpoint(self._out / name), open_checkpoint(self._out / source)
        return verify_values(checkpoint, original)


def _found(result: Mapping[str, Any]) -> str:
    """A comparison in a line."""
    tokens, floor = result["coverage"]["tokens"], result["noise_floor"]["kl_mean"]
    return (
        f"{result['verdict']} logits on {tokens:,} tokens, mean KL {result['kl_mean']:.2g} where the original is "
        f"{floor:.2g} from itself"
    )
