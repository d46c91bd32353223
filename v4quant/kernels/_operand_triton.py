"""Operands of matrix products: BF16 on devices, float32 in Triton's interpreter, which takes BF16 for integers."""

import triton
import triton.language as tl

from v4quant.kernels._rounding_triton import from_bf16_bits

# True in the interpreter. Kernels take it as a compile-time argument, so that offline compiles see the device's code.
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def operand(bits, FLOAT32: tl.constexpr):
    """Operand of tl.dot from BF16 bits, uint16."""
    if FLOAT32:
        return from_bf16_bits(bits)
    return bits.to(tl.bfloat16, bitcast=True)
