"""What offline compilation is told of a kernel: its arguments at the shapes of a real model, and what to expect.

Every `_X_triton.py` lists its cases in COMPILE_CASES; `_offline.py` compiles them and `tests/kernels/test_offline.py`
compares. Triton is not imported here.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# The matrix instruction that a target shall multiply with.
MMA = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
# What one block may use, in bytes: compute capabilities in the CUDA programming guide; the CDNA 3 instruction set.
SHARED_LIMIT_BYTES = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Global loads of a thread are to be so wide. Tiles are cut for warps of 32: 64 lanes of gfx942 share the same ones.
LOAD_BITS = {"sm_80": 128, "sm_90": 128, "sm_100": 128, "gfx942": 64}
# Loads of weights are to be so wide everywhere: in decode nothing else takes time.
WEIGHT_LOAD_BITS = 128
# Of a prefill chunk, for cases that do not state tokens in their name.
TOKENS = 4096


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch.

    Attributes:
        moved_bytes: that its programs load and store according to grid and tiles, whichever cache serves them.
        least_bytes: with every operand read once and the result written once.
    """

    moved_bytes: int
    least_bytes: int


def once(moved_bytes: int) -> Traffic:
    """Traffic of a kernel that touches every byte once."""
    return Traffic(moved_bytes, moved_bytes)


@dataclass(frozen=True)
class CompileCase:
    """A kernel at the shapes of a real model.

    Attributes:
        name: as printed, "act_quant_fp8 [Flash]".
        kernel: the jitted function.
        signature: Triton type of each argument, in order; "constexpr" for compile-time ones.
        constexprs: their values.
        traffic: of a launch at these shapes.
        odd: sizes that need not be a multiple of 16, such as numbers of tokens.
        num_warps, num_stages: as the launch chooses them.
        multiplies: whether it has a matrix product.
        mma: matrix instruction by target, where it is another than MMA says; the reason stands beside the case.
        weight: the pointer, by its name in the source, whose loads must be WEIGHT_LOAD_BITS wide; none: any load
            counts, LOAD_BITS wide.
        targets: those that the launch uses this variant on.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    traffic: Traffic
    odd: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 1
    multiplies: bool = False
    mma: Mapping[str, str] = field(default_factory=dict)
    weight: str = ""
    targets: tuple[str, ...] = TARGETS

    def expected_mma(self, target: str) -> str:
        """ "wgmma"; "" for a kernel without a matrix product."""
        return {**MMA, **self.mma}[target] if self.multiplies else ""

    def expected_load_bits(self, target: str) -> int:
        """How wide the widest load, of weights where it reads any, must be at least."""
        return WEIGHT_LOAD_BITS if self.weight else LOAD_BITS[target]


def modules_with_cases() -> list[str]:
    """Names of the modules of this package that define COMPILE_CASES, without importing them."""
    folder = Path(__file__).parent
    names = (module.name for module in pkgutil.iter_modules([str(folder)]) if module.name.endswith("_triton"))
    return [name for name in names if "\nCOMPILE_CASES" in (folder / f"{name}.py").read_text(encoding="utf-8")]
