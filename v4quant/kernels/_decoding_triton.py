"""Stored codes to floats by integer arithmetic, for kernels: exact for every code, on devices and in the interpreter.

Triton's own casts need FP8 hardware, and its interpreter decodes NaN codes and BF16 subnormals wrongly. A code's bits
are shifted to their places in a larger float, which makes the value times a power of two, subnormals included, and that
is multiplied away: as few operations as there can be, because products decode every weight again for every tile.
"""

import triton
import triton.language as tl


@triton.jit
def e2m1_value(code):
    """float32 of an E2M1 code; bits above the fourth do not matter."""
    bits = code.to(tl.uint32)
    shifted = ((bits & 7) << 22) | ((bits & 8) << 28)
    return shifted.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def e4m3_value(byte):
    """float32 of a finite E4M3 byte."""
    bits = byte.to(tl.uint32)
    shifted = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
    return shifted.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def e4m3_or_nan(byte):
    """float32 of an E4M3 byte, NaN for 0x7F and 0xFF: for what was not checked to be finite."""
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), e4m3_value(byte))


@triton.jit
def e4m3_half(byte):
    """float16 of a finite E4M3 byte times 2^-8; exact, FP16's subnormals reach 2^-24."""
    bits = byte.to(tl.uint16)
    return (((bits & 0x7F) << 7) | ((bits & 0x80) << 8)).to(tl.float16, bitcast=True)


@triton.jit
def e8m0_value(byte):
    """float32 2^(byte - 127); byte 0 is subnormal, byte 255 is NaN."""
    bits = tl.where(byte == 0, 0x00400000, byte.to(tl.uint32) << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.uint32).to(tl.float32, bitcast=True)
