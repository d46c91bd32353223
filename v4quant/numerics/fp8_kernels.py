"""Fast casts between FP8 and BF16, on chunks of 32 weights of one row; a 128x128 block shares a scale.

    codes  uint8 [R, C], E4M3    bits  uint16 [R, C], BF16    scale  uint8 [ceil(R/128), ceil(C/128)], E8M0

The arithmetic is on bits. `base` is the number that makes a normal E4M3 code, shifted under BF16's exponent field, into
its BF16 bits: (code << 4) + base, base = (scale byte - 7) << 7; 7 is E4M3's exponent bias. Subnormal codes 4-7, 2-3
and 1 have one, two and three leading zeros more. Blocks whose results may leave BF16's normal range, and blocks whose
width is no multiple of 32, are marked in `left` and not done.
"""

# built on 9a34f032df2b0874 (see _kernel)

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite.ir import IRBuilder as Builder
from llvmlite.ir import Value

from v4quant.numerics._kernel import kernel
from v4quant.numerics.block_scale import ALL_ZERO_BYTE
from v4quant.numerics.e8m0 import E8M0_NAN
from v4quant.numerics.lanes import Lanes, lane_function, load, splat, store, where

CHUNK = 32
BLOCK = 128

# Scale bytes under which 2^-9 x scale is a normal BF16 number and 448 x scale a finite one.
DECODE_FIRST_BYTE, DECODE_LAST_BYTE = 10, 246
# The least scale byte under which half the least subnormal (a rounding threshold) is a normal BF16 number.
ENCODE_FIRST_BYTE = 11
ANY_BASE = 120 << 7  # zeros are zeros under any scale

Array = npt.NDArray[Any]


def _bf16_magnitude(code: Lanes, base: Lanes) -> Lanes:
    """BF16 bits of E4M3 magnitudes 0x00 to 0x7E, in 16-bit lanes."""
    one = where(code > 0, base - 0x100, 0)
    two = where(code > 1, (code << 6) + (base - 0x100), one)
    four = where(code > 3, (code << 5) + (base - 0x80), two)
    return where(code > 7, (code << 4) + base, four)


@lane_function(results=1)
def _decode_chunk(build: Builder, source: Value, base_bits: Value, target: Value) -> Value:
    """Decode a chunk; count the NaN codes in it."""
    codes = load(build, source, lanes=CHUNK, bits=8).to(16)
    magnitude = codes & 0x7F
    base = splat(build, base_bits, lanes=CHUNK, bits=16)
    store(target, _bf16_magnitude(magnitude, base) | ((codes & 0x80) << 8))
    return magnitude.equals(0x7F).count()


@lane_function(results=1)
def _largest_magnitude(build: Builder, source: Value) -> Value:
    return (load(build, source, lanes=CHUNK, bits=16) & 0x7FFF).maximum()


@lane_function(results=1)
def _largest_magnitude_of_block_row(build: Builder, source: Value) -> Value:
    return (load(build, source, lanes=BLOCK, bits=16) & 0x7FFF).maximum()


def _finish(value: Lanes, code: Lanes, decoded: Lanes, target: Value) -> Any:
    """Put signs to encoded magnitudes, store them, and count what changed and the zeros that lost their sign."""
    sign = value & 0x8000
    store(target, (code | (sign >> 8)).to(8))
    changed = (decoded | sign).differs(value)
    return changed.count(), (changed & value.equals(0x8000)).count()


@lane_function(results=3)
def _encode_normal(build: Builder, source: Value, base_bits: Value, target: Value) -> Any:
    """Round a chunk of at most 448 x scale to E4M3, if it has no subnormal results.

    Returns:
        Elements changed, negative zeros lost, non-zero elements below E4M3's normal range: if any, do it again.
    """
    value = load(build, source, lanes=CHUNK, bits=16)
    magnitude = value & 0x7FFF
    base = splat(build, base_bits, lanes=CHUNK, bits=16)
    odd = (magnitude >> 4) & 1
    code = (magnitude + odd).minus_down_to_zero(base - 7) >> 4  # zero stays zero
    decoded = where(magnitude > 0, (code << 4) + base, 0)
    small = (magnitude - 1) < (base + 0x7F)
    return *_finish(value, code, decoded, target), small.count()


@lane_function(results=2)
def _encode_any(build: Builder, source: Value, base_bits: Value, target: Value) -> Any:
    """Round a chunk of at most 448 x scale to E4M3, subnormal results included."""
    value = load(build, source, lanes=CHUNK, bits=16)
    magnitude = value & 0x7FFF
    base = splat(build, base_bits, lanes=CHUNK, bits=16)
    odd = (magnitude >> 4) & 1
    normal = (magnitude + odd).minus_down_to_zero(base - 7) >> 4
    # Subnormal code n means n x 2^-9. Ties, n + 0.5, go to the even neighbour.
    code = (magnitude > base - 0x180).to(16)  # 0.5
    code = code + (magnitude >= base - 0xC0).to(16)  # 1.5
    code = code + (magnitude > base - 0x60).to(16)  # 2.5
    code = code + (magnitude >= base - 0x20).to(16)  # 3.5
    code = code + (magnitude > base + 0x10).to(16)  # 4.5
    code = code + (magnitude >= base + 0x30).to(16)  # 5.5
    code = code + (magnitude > base + 0x50).to(16)  # 6.5
    code = code + (magnitude >= base + 0x70).to(16)  # 7.5
    code = where(magnitude >= base + 0x80, normal, code)
    return _finish(value, code, _bf16_magnitude(code, base), target)


@kernel
def decode_to_bf16(codes: Array, scale: Array, out: Array, left: Array) -> tuple[int, int]:
    """FP8 -> BF16; blocks that may leave BF16's normal range are marked in `left` [ceil(R/128), ceil(C/128)].

    Returns:
        Blocks left, NaN codes seen in the others.
    """
    rows, columns = codes.shape
    blocks_left, nans = 0, 0
    for block_row in range(scale.shape[0]):
        for block_column in range(scale.shape[1]):
            byte = scale[block_row, block_column]
            width = min(columns - block_column * BLOCK, BLOCK)
            if byte < DECODE_FIRST_BYTE or byte > DECODE_LAST_BYTE or width % CHUNK != 0:
                left[block_row, block_column] = True
                blocks_left += 1
        for row in range(block_row * BLOCK, min(block_row * BLOCK + BLOCK, rows)):
            source = np.int64(codes.ctypes.data) + row * columns
            target = np.int64(out.ctypes.data) + row * columns * 2
            for block_column in range(scale.shape[1]):
                if left[block_row, block_column]:
                    continue
                base = (np.int64(scale[block_row, block_column]) - 7) << 7
                for column in range(block_column * BLOCK, min(block_column * BLOCK + BLOCK, columns), CHUNK):
                    nans += _decode_chunk(source + column, base, target + column * 2)
    return blocks_left, nans


@kernel
def _block_amax(bits: Array, block_row: int, amax: Array) -> None:
    """Largest magnitude bits of each block of one row of blocks; blocks of odd widths get 0."""
    rows, columns = bits.shape
    amax[:] = 0
    for row in range(block_row * BLOCK, min(block_row * BLOCK + BLOCK, rows)):
        source = np.int64(bits.ctypes.data) + row * columns * 2
        for block_column in range(amax.size):
            first, last = block_column * BLOCK, min(block_column * BLOCK + BLOCK, columns)
            if last - first == BLOCK:
                largest = _largest_magnitude_of_block_row(source + first * 2)
                amax[block_column] = max(amax[block_column], largest)
            elif (last - first) % CHUNK == 0:
                for column in range(first, last, CHUNK):
                    amax[block_column] = max(amax[block_column], _largest_magnitude(source + column * 2))


@kernel
def _encode_blocks(bits: Array, block_row: int, base: Array, todo: Array, out: Array, counts: Array) -> None:
    """Encode those blocks of a row of blocks that are `todo`; add to their counts of changes and lost -0."""
    rows, columns = bits.shape
    for row in range(block_row * BLOCK, min(block_row * BLOCK + BLOCK, rows)):
        source = np.int64(bits.ctypes.data) + row * columns * 2
        target = np.int64(out.ctypes.data) + row * columns
        for block_column in range(base.size):
            if not todo[block_column]:
                continue
            changed_here, lost_here = 0, 0
            for column in range(block_column * BLOCK, min(block_column * BLOCK + BLOCK, columns), CHUNK):
                changed, lost, small = _encode_normal(source + column * 2, base[block_column], target + column)
                if small > 0:
                    changed, lost = _encode_any(source + column * 2, base[block_column], target + column)
                changed_here += changed
                lost_here += lost
            counts[block_column, 0] += changed_here
            counts[block_column, 1] += lost_here


@kernel
def encode_bf16(
    bits: Array, like: Array, has_like: bool, out: Array, out_scale: Array, left: Array
) -> tuple[int, int, int, int]:
    """BF16 -> FP8; blocks whose thresholds leave BF16's normal range are marked in `left` and not done.

    Args:
        like: scale bytes to use wherever they reproduce a block's values, if has_like.

    Returns:
        Elements changed, negative zeros lost, blocks left, largest magnitude bits seen in whole chunks.
    """
    columns = bits.shape[1]
    blocks = out_scale.shape[1]
    amax = np.zeros(blocks, np.int64)
    rule, byte, base = np.zeros(blocks, np.int64), np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
    todo = np.zeros(blocks, np.bool_)
    counts = np.zeros((blocks, 2), np.int64)
    inexact, zeros_lost, blocks_left, largest = 0, 0, 0, 0
    for block_row in range(out_scale.shape[0]):
        _block_amax(bits, block_row, amax)
        for block in range(blocks):
            largest = max(largest, amax[block])
            # block_scale's rule on bits: 448 = 1.75 x 2^8; a mantissa above 1.75 (0x60) carries into the exponent.
            rule[block] = ((amax[block] + 0x1F) >> 7) - 8 if amax[block] > 0 else ALL_ZERO_BYTE
            byte[block] = rule[block]
            if (
                has_like
                and like[block_row, block] != E8M0_NAN
                and (amax[block] == 0 or like[block_row, block] >= rule[block])
            ):
                byte[block] = like[block_row, block]
            base[block] = (byte[block] - 7) << 7 if amax[block] > 0 else ANY_BASE
            todo[block] = amax[block] == 0 or rule[block] >= ENCODE_FIRST_BYTE
            todo[block] &= min(columns - block * BLOCK, BLOCK) % CHUNK == 0
            left[block_row, block] = not todo[block]
            blocks_left += not todo[block]
        counts[:] = 0
        _encode_blocks(bits, block_row, base, todo, out, counts)
        again = False
        for block in range(blocks):
            todo[block] = counts[block, 0] > 0 and byte[block] != rule[block]
            if todo[block]:
                byte[block] = rule[block]
                base[block] = (rule[block] - 7) << 7
                counts[block] = 0
                again = True
        if again:
            _encode_blocks(bits, block_row, base, todo, out, counts)
        for block in range(blocks):
            out_scale[block_row, block] = byte[block]
            inexact += counts[block, 0]
            zeros_lost += counts[block, 1]
    return inexact, zeros_lost, blocks_left, largest
