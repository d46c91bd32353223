"""Compile kernels for GPUs that are not there, and print what they will need.

    python -m v4quant.kernels._offline [--json] [MODULE ...]      all modules' COMPILE_CASES, or those of some modules

Triton compiles to PTX or AMD assembly, and on to machine code, without a device or driver; its wheel brings the tools.
One row a case and target: registers, bytes spilled, shared memory, matrix instruction, widest load (of the weight,
where a kernel reads one), bytes that a launch moves over the least possible. What this cannot show: races, launch
limits, speed.
"""

import argparse
import dataclasses
import importlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from v4quant.kernels._compile_case import CompileCase, modules_with_cases

# Read when Triton is imported: with this it does not warn that fusion's default will change. Launches set their own.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from v4quant.kernels._machine_code import Resources, read_resources


def _gpu(target: str) -> GPUTarget:
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def compile_offline(case: CompileCase, target: str) -> Resources:
    """Compile one case for one target of TARGETS.

    Raises:
        triton.CompilationError: if it does not compile.
    """
    # Triton finds out at launch that pointers and sizes are multiples of 16, which lets loads be wide.
    attrs = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(case.signature.items())
        if kind != "constexpr" and name not in case.odd
    }
    source = ASTSource(fn=case.kernel, signature=dict(case.signature), constexprs=dict(case.constexprs), attrs=attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": False}
    return read_resources(triton.compile(source, target=_gpu(target), options=options), case.weight)


def table(modules: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rows for all cases of some modules, in order: the fields of Resources and Traffic, and what is expected."""
    pairs = [
        (case, target)
        for module in modules
        for case in importlib.import_module(f"v4quant.kernels.{module}").COMPILE_CASES
        for target in case.targets
    ]
    # Compilers release Python's lock most of the time.
    with ThreadPoolExecutor(2) as pool:
        for (case, target), found in zip(pairs, pool.map(lambda pair: compile_offline(*pair), pairs), strict=True):
            yield {
                "kernel": case.name,
                "target": target,
                **dataclasses.asdict(found),
                **dataclasses.asdict(case.traffic),
                "expected_mma": case.expected_mma(target),
                "expected_load_bits": case.expected_load_bits(target),
            }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['kernel']:<46}{row['target']:<8}{row['registers']:>5}{row['spilled_bytes']:>7}{row['shared_bytes']:>9}"
        f"  {row['mma'] or '-':<8}{row['load_bits']:>5}{row['moved_bytes'] / 1e6:>12.3f}"
        f"{row['moved_bytes'] / row['least_bytes']:>8.2f}"
    )


def main() -> None:
    """Print the table; with --json one object a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="such as _fp8_gemm_triton")
    arguments = parser.parse_args()
    if not arguments.json:
        print(
            f"{'kernel':<46}{'target':<8}{'regs':>5}{'spill B':>8}{'shared B':>8}  {'mma':<8}{'load':>5}"
            f"{'moved MB':>12}{'/ least':>8}"
        )
    for row in table(arguments.modules or modules_with_cases()):
        print(json.dumps(row) if arguments.json else _line(row), flush=True)


if __name__ == "__main__":
    main()
