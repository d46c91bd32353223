"""Stored codes to float32 by integer arithmetic, for kernels: exact for every code, on devices and in the interpreter.

Triton's own casts need FP8 hardware, and its interpreter decodes NaN codes and BF16 subnormals wrongly.
"""

import triton
import triton.language as tl


@triton.jit
def e2m1_value(code):
    """float32 of E2M1 codes 0 to 15."""
    magnitude = code.to(tl.uint32) & 7
    bits = tl.where(magnitude < 2, magnitude * 0x3F000000, (magnitude << 22) + 0x3F000000)
    return (bits | ((code.to(tl.uint32) & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_value(byte):
    """float32 of E4M3 bytes; 0x7F and 0xFF are NaN."""
    magnitude = byte.to(tl.uint32) & 0x7F
    normal = (magnitude << 20) + 0x3C000000
    # Below 2^-6 codes count in steps of 2^-9.
    subnormal = (magnitude.to(tl.float32) * 0.001953125).to(tl.uint32, bitcast=True)
    bits = tl.where(magnitude < 8, subnormal, normal)
    bits = tl.where(magnitude == 0x7F, 0x7FC00000, bits)
    return (bits | ((byte.to(tl.uint32) & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_value(byte):
    """float32 2^(byte - 127); byte 0 is subnormal, byte 255 is NaN."""
    bits = tl.where(byte == 0, 0x00400000, byte.to(tl.uint32) << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.uint32).to(tl.float32, bitcast=True)
