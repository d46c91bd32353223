"""`v4quant inspect`: what a checkpoint holds and what is wrong with it, from headers alone."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from v4quant.cli._options import AnySource, JsonMode
from v4quant.cli._output import Output, decimal_bytes, plural
from v4quant.errors import CheckpointError

if TYPE_CHECKING:
    from v4quant.checkpoint.reader import Checkpoint


def inspect(
    src: AnySource,
    json_mode: JsonMode = False,
) -> None:
    """Tell format and release from what is stored, and list every problem; reads headers only.

    \b
    v4quant inspect DeepSeek-V4-Flash
    v4quant inspect DeepSeek-V4-Flash --json
    v4quant inspect hf://deepseek-ai/DeepSeek-V4-Flash@main
    """
    from v4quant.cli._source import open_source, remote_facts

    output = Output(json_mode)
    checkpoint = open_source(src)
    census = _Census(checkpoint)
    where = remote_facts(output, checkpoint)
    output.result(
        {
            "format": checkpoint.scheme.name,
            "release": checkpoint.release,
            "tensors": len(checkpoint.tensors),
            "bytes": checkpoint.bytes,
            "parameters": census.parameters,
            "by_dtype": census.by_dtype,
            "by_role": census.by_role,
            "problems": [str(problem) for problem in checkpoint.problems],
        }
        | where
    )
    _print_summary(output, checkpoint, census)
    if checkpoint.problems:
        raise CheckpointError(
            f"{src}: {plural(len(checkpoint.problems), 'problem')}",
            hint="Nothing is converted from a checkpoint with problems; download or export what is named above again.",
        )
    output.note(f"next: v4quant convert {src} OUT --to fp8 --dry-run")


class _Census:
    """Tensors, bytes and parameters by dtype and by role.

    Attributes:
        by_dtype: dtype -> tensors and bytes.
        by_role: role, "mtp." before it in MTP blocks -> tensors, bytes and parameters.
    """

    def __init__(self, checkpoint: "Checkpoint") -> None:
        self.by_dtype: dict[str, dict[str, int]] = {}
        self.by_role: dict[str, dict[str, int]] = {}
        for name, entry in checkpoint.tensors.items():
            parts = checkpoint.parsed.get(name)
            role = parts.group if parts else "unknown"
            of_dtype = self.by_dtype.setdefault(entry.dtype, {"tensors": 0, "bytes": 0})
            of_role = self.by_role.setdefault(role, {"tensors": 0, "bytes": 0, "parameters": 0})
            for counts in (of_dtype, of_role):
                counts["tensors"] += 1
                counts["bytes"] += entry.bytes
            # Block scales and hash tables are no parameters; FP4 codes are counted unpacked.
            if parts and not parts.is_scale and entry.dtype != "I64":
                of_role["parameters"] += math.prod(entry.shape) * (2 if entry.dtype == "I8" else 1)

    @property
    def parameters(self) -> int:
        """Logical parameters, MTP blocks included."""
        return sum(counts["parameters"] for counts in self.by_role.values())


def _print_summary(output: Output, checkpoint: "Checkpoint", census: _Census) -> None:
    shards = plural(len(checkpoint.header_sha256), "shard")
    output.line(f"{checkpoint.release}, stored as {checkpoint.scheme.name} ({shards})")
    output.line(
        f"{plural(len(checkpoint.tensors), 'tensor')}, {checkpoint.bytes:,} bytes ({decimal_bytes(checkpoint.bytes)}), "
        f"{census.parameters:,} parameters"
    )
    output.line()
    _print_table(output, "role", census.by_role)
    output.line()
    _print_table(output, "dtype", census.by_dtype)
    if checkpoint.foreign_files:
        output.line()
        output.line(f"no part of the checkpoint (no V4 tensor, in no index): {', '.join(checkpoint.foreign_files)}")
    output.line()
    if not checkpoint.problems:
        output.line("no problems: config, index and headers agree")
        return
    output.line(f"{plural(len(checkpoint.problems), 'problem')}:")
    for text, count in checkpoint.problem_groups:
        output.line(f"  {text}")
        if count > 1:
            output.line(f"    ... and {count - 1:,} alike")
    shown = sum(count for _, count in checkpoint.problem_groups)
    if shown < len(checkpoint.problems):
        output.line(f"  ... and {len(checkpoint.problems) - shown:,} others (all of them: --json)")


def _print_table(output: Output, head: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print counts, largest first; bits per weight where parameters are known, scales counted with their weights."""
    width = max(map(len, [head, *rows]), default=0)
    has_parameters = all("parameters" in counts for counts in rows.values())
    more = f"{'parameters':>20}{'bits/weight':>13}" if has_parameters else ""
    output.line(f"{head:<{width}}{'tensors':>10}{'bytes':>20}{more}")
    for name, counts in sorted(rows.items(), key=lambda row: -row[1]["bytes"]):
        line = f"{name:<{width}}{counts['tensors']:>10,}{counts['bytes']:>20,}"
        if has_parameters:
            parameters = counts["parameters"]
            bits = f"{8 * counts['bytes'] / parameters:.2f}" if parameters else "-"
            line += f"{parameters:>20,}{bits:>13}"
        output.line(line)
