"""Compile kernels for GPUs that are not there, and read from the machine code what they will need.

    python -m v4quant.kernels._offline      prints the table for every case of every kernel

Triton compiles to PTX and machine code without a device or driver; its wheel brings the tools that tell registers,
stack (spilled registers live there), shared memory, matrix instructions and the width of global loads. What this cannot
show: races, launch limits, speed.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
}
# What one block may use, in bytes: the tables of compute capabilities in the CUDA programming guide.
SHARED_LIMIT_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Matrix instructions by what they look like in PTX.
_MMA = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}


@dataclass(frozen=True)
class CompileCase:
    """A kernel at the shapes of a real model.

    Attributes:
        name: as printed, "act_quant_fp8 [Flash]".
        kernel: the jitted function.
        signature: Triton type of each argument, in order; "constexpr" for compile-time ones.
        constexprs: their values.
        odd: sizes that need not be a multiple of 16, such as numbers of tokens.
        num_warps, num_stages: as the launch chooses them.
        needs_mma: whether it multiplies matrices.
        targets: those that the launch uses this variant on.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    odd: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 1
    needs_mma: bool = False
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread; more than none means spilled registers.
        shared_bytes: of a block.
        tensor_memory_columns: of sm_100's tensor memory.
        mma: "tcgen05", "wgmma", "mma" or "".
        widest_load_bits: of one thread's global loads, or copies from global to shared memory.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    mma: str
    widest_load_bits: int
    ptx: str = field(repr=False)


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
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    ptx = compiled.asm["ptx"]
    registers, stack = _usage(compiled.asm["cubin"])
    return Resources(
        registers,
        stack,
        compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", 0) or 0,
        next((kind for kind, text in _MMA.items() if text in ptx), ""),
        _widest_load_bits(ptx),
        ptx,
    )


_LOAD = r"ld\.global\.(?:[a-z0-9_:]+\.)*?(?:v(\d)\.)?[bfus](\d+)"
# Pipelined loops copy straight to shared memory: "cp.async.cg.shared.global [...], [...], 0x10", in bytes.
_COPY = r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x([0-9a-f]+)"

# Whole tiles by the copy engine, which reads no less than 16 bytes at a time.
_BULK_COPY = "cp.async.bulk.tensor"


def _widest_load_bits(ptx: str) -> int:
    loads = [int(match[1] or 1) * int(match[2]) for match in re.finditer(_LOAD, ptx)]
    copies = [8 * int(match[1], 16) for match in re.finditer(_COPY, ptx)]
    bulk = [128] if _BULK_COPY in ptx else []
    return max(loads + copies + bulk, default=0)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, f"cuobjdump says no registers: {text[:200]}"
    return int(found[1]), int(found[2])
