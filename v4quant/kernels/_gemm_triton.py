"""What the quantised matrix products share: decoding E2M1, E4M3 and E8M0 in registers, one step along K.

Tiles are transposed: acc is [BLOCK_N weight rows, BLOCK_M tokens]. NaN codes are not expected.
"""

import triton
import triton.language as tl

from v4quant.kernels._decoding_triton import e2m1_value, e4m3_half, e4m3_value, e8m0_value


@triton.jit
def halves(word, BITS: tl.constexpr):
    """word and its part from bit BITS on, side by side in a new last dimension; bits above do not matter."""
    return tl.join(word, word >> BITS)


@triton.jit
def load_scale(ptr):
    """float32 of FP8 weight scales, stored as E8M0 bytes or as float32."""
    scale = tl.load(ptr)
    return scale if ptr.dtype.element_ty == tl.float32 else e8m0_value(scale)


@triton.jit
def load_activations(
    x_ptr, scale_ptr, row, k, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PATH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A tile of activations as PATH multiplies them, and their scales as it applies them.

    row [BLOCK_M] are rows of x [., K] and of its E8M0 scales [., K/128].
    """
    x = tl.load(x_ptr + row[None, :] * K + (k + tl.arange(0, BLOCK_K))[:, None])  # [BLOCK_K, BLOCK_M]
    if PATH == "scaled":
        group = (k // 32 + tl.arange(0, BLOCK_K // 32)) // 4
        operand = x
        scale = tl.load(scale_ptr + row[:, None] * (K // 128) + group[None, :])  # [BLOCK_M, BLOCK_K/32]
    else:
        scale = e8m0_value(tl.load(scale_ptr + row * (K // 128) + k // 128))  # [BLOCK_M]
        if PATH == "upcast":
            value = (e4m3_value(x) * scale[None, :]).to(COMPUTE)
            # In the order that add_fp4_product unpacks weights to.
            value = value.reshape(BLOCK_K // 32, 4, 4, 2, BLOCK_M).permute(0, 2, 1, 3, 4)
            operand = value.reshape(BLOCK_K, BLOCK_M)
        elif PATH == "fp8":
            operand = x.to(tl.float8e4nv, bitcast=True)
        else:
            operand = e4m3_half(x)
            scale *= 65536.0  # both operands carry 2^-8
    return operand, scale


@triton.jit
def add_fp4_product(
    acc, w_ptr, scale_ptr, first, k, K, x, x_scale,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PATH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """acc + w x over one step of K: rows from `first` on of w [., K/2] bytes with E8M0 scales [., K/32].

    Path "scaled" takes w as a tensor descriptor of [BLOCK_N, BLOCK_K/2] bytes: only the copy engine fills the padded
    shared memory that the matrix instruction wants with wide accesses. Path "upcast" takes w and scales as int32 words
    of 8 codes or 4 scales. The threads of a matrix instruction's row hold columns 2 i, 2 i + 1 each (i = 0 to 3) of 8:
    with the columns of 32 in the order (pair in word, word, half of the pair), each thread owns whole words, and
    decodes them where they are.
    """
    row = first.to(tl.int64) + tl.arange(0, BLOCK_N)
    groups: tl.constexpr = BLOCK_K // 32
    if PATH == "scaled":
        packed = w_ptr.load([first, k // 2])  # [BLOCK_N, BLOCK_K/2]
        group = k // 32 + tl.arange(0, groups)
        scale = tl.load(scale_ptr + row[:, None] * (K // 32) + group[None, :])  # [BLOCK_N, groups]
        acc = tl.dot_scaled(packed, scale, "e2m1", x, x_scale, "e4m3", acc)
    else:
        column = tl.multiple_of(k // 8, BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        word = tl.load(w_ptr + row[:, None] * tl.multiple_of(K // 8, 16) + column[None, :])  # [BLOCK_N, BLOCK_K/8]
        code = halves(halves(halves(word.reshape(BLOCK_N, groups, 4), 16), 8), 4)  # [BLOCK_N, groups, 4, 2, 2, 2]
        code = code.permute(0, 1, 3, 4, 2, 5).reshape(BLOCK_N, groups, 32)
        scale = tl.load(scale_ptr + row * (K // 128) + k // 128) >> (8 * (k // 32 % 4))  # [BLOCK_N]
        if groups == 4:
            scale = halves(halves(scale, 16), 8).reshape(BLOCK_N, groups)
        else:
            tl.static_assert(groups == 2, "steps of 64 or 128 along K")
            scale = halves(scale, 8)
        w = (e2m1_value(code) * e8m0_value(scale & 0xFF)[:, :, None]).reshape(BLOCK_N, BLOCK_K).to(COMPUTE)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    return acc


@triton.jit
def add_fp8_product(acc, w_ptr, scale_ptr, row, k, K, x, x_scale, BLOCK_K: tl.constexpr, PATH: tl.constexpr):
    """acc + (w x) x scales over 128 of K: rows `row` of w [., K]; scale_ptr points to their scale."""
    tl.static_assert(BLOCK_K == 128, "one scale for a step of K")
    w = tl.load(w_ptr + row[:, None] * K + (k + tl.arange(0, BLOCK_K))[None, :])  # [BLOCK_N, 128]
    partial = tl.dot(w.to(tl.float8e4nv, bitcast=True) if PATH == "fp8" else e4m3_half(w), x)
    return acc + partial * (x_scale * load_scale(scale_ptr))[None, :]


@triton.jit
def add_scaled_fp8_product(
    acc, w_ptr, scale_ptr, first, k, x, x_scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The same by block-scaled instructions, which take E8M0 scales: w_ptr is a descriptor of [BLOCK_N, 128] bytes."""
    tl.static_assert(BLOCK_K == 128, "one scale for a step of K")
    scale = tl.full((BLOCK_N, BLOCK_K // 32), 0, tl.uint8) + tl.load(scale_ptr)
    return tl.dot_scaled(w_ptr.load([first, k]), scale, "e4m3", x, x_scale, "e4m3", acc)
