"""What a compiled kernel will need, read from its assembly and machine code.

NVIDIA: PTX, and cuobjdump of Triton's wheel on the machine code. AMD: the assembly and the metadata at its end.
"""

import linecache
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_FOLDER = Path(__file__).parent
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Matrix instructions by what they look like, the most capable first.
_MMA = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync", "mfma": "v_mfma_"}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses.

    Attributes:
        registers: of a thread.
        spilled_bytes: of a thread's stack, where registers go that there are too few of.
        shared_bytes: of a block.
        tensor_memory_columns: of sm_100's tensor memory.
        mma: "tcgen05", "wgmma", "mma", "mfma" or "".
        load_bits: of one thread's widest global load, or copy from global to shared memory; only loads of the weight
            count where a case names one.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    mma: str
    load_bits: int


def read_resources(compiled: Any, weight: str) -> Resources:
    """Resources of a kernel that triton.compile returned.

    Args:
        weight: name of the pointer whose loads count; "" for all.
    """
    is_amd = "amdgcn" in compiled.asm
    text = compiled.asm["amdgcn" if is_amd else "ptx"]
    registers, spilled = _amd_usage(text) if is_amd else _nvidia_usage(compiled.asm["cubin"])
    widths = [bits for source, bits in _loads(text) if weight in source]
    return Resources(
        registers,
        spilled,
        compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", 0) or 0,
        next((kind for kind, instruction in _MMA.items() if instruction in text), ""),
        max(widths, default=0),
    )


# ".loc 3 60 9 // _gemm_triton.py:60:9": what follows comes from there.
_PLACE = re.compile(r"\.loc\s.*?([\w.]+\.py):(\d+):\d+")
_LOAD = re.compile(r"ld\.global\.(?:[a-z0-9_:]+\.)*?(?:v(\d)\.)?[bfus](\d+)")
# Pipelined loops copy straight to shared memory: "cp.async.cg.shared.global [...], [...], 0x10", in bytes.
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x([0-9a-f]+)")
# Whole tiles by the copy engine, which reads no less than 16 bytes at a time.
_BULK_COPY = "cp.async.bulk.tensor"
_AMD_LOAD = re.compile(r"(?:global|buffer)_load_(dwordx4|dwordx3|dwordx2|dword|s?short|ushort|[us]byte)")
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "sshort": 16}


def _loads(text: str) -> Iterator[tuple[str, int]]:
    """The source line that each load comes from ("" outside this package), and its width in bits."""
    source = ""
    inline = False  # places within inline assembly count its lines on from the statement's own
    for line in text.splitlines():
        inline = "begin inline asm" in line or (inline and "end inline asm" not in line)
        place = _PLACE.search(line)
        if place and not inline:
            source = linecache.getline(str(_FOLDER / place[1]), int(place[2]))
        elif load := _LOAD.search(line):
            yield source, int(load[1] or 1) * int(load[2])
        elif copy := _COPY.search(line):
            yield source, 8 * int(copy[1], 16)
        elif _BULK_COPY in line:
            yield source, 128
        elif load := _AMD_LOAD.search(line):
            yield source, _AMD_BITS.get(load[1], 8)


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
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


def _amd_usage(text: str) -> tuple[int, int]:
    """Vector registers and spilled bytes of the one kernel in AMD assembly."""
    found = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    # Scratch memory of a thread; scalar registers spill into vector registers first.
    spilled = max(found["private_segment_fixed_size"], 4 * found["vgpr_spill_count"], 4 * found["sgpr_spill_count"])
    return found["vgpr_count"], spilled
