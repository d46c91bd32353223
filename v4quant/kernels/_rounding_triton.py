"""Rounding by integer arithmetic, for kernels: nearest, ties to even, saturating, sign of zero kept.

Triton's own casts differ between devices and its interpreter (which truncates to BF16, and rounds E4M3 wrongly), so
every result that is rounded is rounded here, on bits. Inputs are finite float32.
"""

import triton
import triton.language as tl


@triton.jit
def bf16_bits(x):
    """BF16 bits of float32 x, uint16."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)


@triton.jit
def from_bf16_bits(bits):
    """float32 of BF16 bits, uint16; exact, subnormals included."""
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_byte(x):
    """E4M3 byte of float32 x."""
    bits = tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.uint32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are 2^-9 apart: adding 2^14, whose last bit is 2^-9, leaves the rounded code in the low bits.
    absolute = magnitude.to(tl.float32, bitcast=True)
    subnormal = (absolute + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return (tl.where(absolute < 0.015625, subnormal, normal) | sign).to(tl.uint8)


@triton.jit
def e2m1_code(x):
    """E2M1 code of float32 x, 0 to 15, uint8."""
    sign = (x.to(tl.uint32, bitcast=True) >> 28) & 8
    absolute = tl.minimum(tl.abs(x), 6.0)
    bits = absolute.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - (126 << 1)
    # Below 1 codes are 0.5 apart, which is the last bit of 2^22.
    subnormal = (absolute + 4194304.0).to(tl.uint32, bitcast=True) - 0x4A800000
    return (tl.where(absolute < 1.0, subnormal, normal) | sign).to(tl.uint8)


@triton.jit
def e8m0_byte(amax, INVERSE: tl.constexpr):
    """E8M0 byte of 2^ceil(log2(amax x INVERSE)); amax is positive."""
    bits = (amax * INVERSE).to(tl.uint32, bitcast=True)
    return (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)


@triton.jit
def power_of_two(byte):
    """float32 2^(byte - 127) for bytes 1 to 254."""
    return (byte.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
