"""Fast casts from and to FP4, on groups of 32 weights of one row that share a scale.

    packed  uint8 [R, G*16], two E2M1 codes a byte, even column low    scale  uint8 [R, G], E8M0
    values  uint16 [R, G*32], BF16 bits                                codes  uint8 [R, G*32], E4M3

The arithmetic is on bits. E2M1 codes 2 to 7 are normal numbers with one mantissa bit, so shifting them under the
exponent field of the target and adding a constant decodes them; only 0 and 1 (zero and the subnormal 0.5) stand apart.
`half`, the target's bits of 0.5 x scale, is that constant. This holds while results stay normal in the target; groups
where they may not are looked up in a table made by the reference codec, or left to the caller.
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

GROUP = 32
GROUP_BYTES = GROUP // 2
BLOCK = 128
BLOCK_GROUPS = BLOCK // GROUP

# Scale bytes under which 0.5 x scale is a normal BF16 number and 6 x scale a finite one.
BF16_FIRST_BYTE, BF16_LAST_BYTE = 2, 252
# Offsets (group scale over block scale, as powers of two): 0.5 x 2^-5 = 2^-6 is E4M3's least normal number, and under
# 6 x 2^6 = 384 every E2M1 value fits. The table goes on to where everything rounds to zero: 6 x 2^-13 < 2^-10.
E4M3_FIRST_OFFSET, E4M3_LAST_OFFSET = -5, 6
TABLE_FIRST_OFFSET = -13
# Every E2M1 value is exact in E4M3 at offsets -8 to 6, so scales may spread by 2^14 (tests try all offsets).
FP4_TO_FP8_SPREAD_BOUND = 14
# The least scale byte under which every rounding threshold (0.25 x scale at least) is a normal BF16 number.
ENCODE_FIRST_BYTE = 3
ANY_HALF = 126 << 7  # zeros are zeros under any scale

_INTERLEAVED = [lane for pair in range(GROUP_BYTES) for lane in (pair, GROUP_BYTES + pair)]

Array = npt.NDArray[Any]


def _load_codes(build: Builder, source: Value) -> Lanes:
    """The 32 codes of a group, even column in the low nibble."""
    packed = load(build, source, lanes=GROUP_BYTES, bits=8)
    return (packed & 0xF).lanes(_INTERLEAVED, packed >> 4)


@lane_function(results=0)
def _decode_to_bf16(build: Builder, source: Value, half_bits: Value, target: Value) -> None:
    codes = _load_codes(build, source).to(16)
    magnitude = codes & 7
    half = splat(build, half_bits, lanes=GROUP, bits=16)
    bits = where(magnitude > 1, (magnitude << 6) + half, where(magnitude > 0, half, 0))
    store(target, bits | ((codes & 8) << 12))


@lane_function(results=0)
def _decode_to_e4m3(build: Builder, source: Value, half_code: Value, target: Value) -> None:
    codes = _load_codes(build, source)
    magnitude = codes & 7
    half = splat(build, half_code, lanes=GROUP, bits=8)
    bits = where(magnitude > 1, (magnitude << 2) + half, where(magnitude > 0, half, 0))
    store(target, bits | ((codes & 8) << 4))


@lane_function(results=1)
def _count_nonzero_pairs(build: Builder, source: Value) -> Value:
    return (load(build, source, lanes=GROUP_BYTES, bits=8) & 0x77).differs(0).count()


@lane_function(results=1)
def _largest_magnitude(build: Builder, source: Value) -> Value:
    return (load(build, source, lanes=GROUP, bits=16) & 0x7FFF).maximum()


@lane_function(results=2)
def _encode_bf16(build: Builder, source: Value, half_bits: Value, target: Value) -> Any:
    """Round a group of at most 6 x scale to E2M1; count what changed, and the zeros that lost their sign."""
    value = load(build, source, lanes=GROUP, bits=16)
    magnitude = value & 0x7FFF
    half = splat(build, half_bits, lanes=GROUP, bits=16)
    # From 0.75 up, the mantissa is rounded to one bit, half to even, and the result is at least 1.0 (code 2).
    odd = (magnitude >> 6) & 1
    from_one = ((magnitude + odd).minus_down_to_zero(half - 0x1F) >> 6).at_least(2)
    # Below, numbers are 0 and 0.5.
    rounds_to_one, exceeds_quarter = magnitude >= half + 0x40, magnitude > half - 0x80
    code = where(rounds_to_one, from_one, exceeds_quarter.to(16))
    sign = value & 0x8000
    nibbles = (code | (sign >> 12)).joined_pairs()
    store(target, (nibbles | (nibbles >> 12)).to(8))
    decoded = where(rounds_to_one, (from_one << 6) + half, where(exceeds_quarter, half, 0)) | sign
    changed = decoded.differs(value)
    return changed.count(), (changed & value.equals(0x8000)).count()


@kernel
def _look_up(packed: Array, row: int, group: int, values: Array, rounded: Array, out: Array) -> int:
    """Decode one group by a table of its 16 codes; count those that the table had to round."""
    inexact = 0
    for i in range(GROUP_BYTES):
        pair = packed[row, group * GROUP_BYTES + i]
        low, high = pair & 0xF, pair >> 4
        out[row, group * GROUP + 2 * i] = values[low]
        out[row, group * GROUP + 2 * i + 1] = values[high]
        inexact += rounded[low] + rounded[high]
    return inexact


@kernel
def decode_to_bf16(packed: Array, scale: Array, values: Array, rounded: Array, out: Array) -> int:
    """FP4 -> BF16 into out [R, G*32]; values, rounded [255, 16]: by scale byte and code. Count the inexact ones."""
    inexact = 0
    source, target = np.int64(packed.ctypes.data), np.int64(out.ctypes.data)
    for row in range(scale.shape[0]):
        for group in range(scale.shape[1]):
            byte = np.int64(scale[row, group])
            if BF16_FIRST_BYTE <= byte <= BF16_LAST_BYTE:
                _decode_to_bf16(source, (byte - 1) << 7, target)
            else:
                inexact += _look_up(packed, row, group, values[byte], rounded[byte], out)
            source += GROUP_BYTES
            target += GROUP * 2
    return inexact


@kernel
def _scale_range(scale: Array, first_row: int, last_row: int, low: Array, high: Array) -> None:
    """Least and largest scale byte of each column of groups."""
    low[:], high[:] = 255, 0
    for row in range(first_row, last_row):
        for group in range(low.size):
            low[group] = min(low[group], scale[row, group])
            high[group] = max(high[group], scale[row, group])


@kernel
def _used_scale_range(packed: Array, scale: Array, first_row: int, last_row: int, first: int, last: int) -> Any:
    """Least and largest scale byte of those groups of a block that hold a non-zero value; (256, -1) if none does."""
    low, high = np.int64(256), np.int64(-1)
    for row in range(first_row, last_row):
        for group in range(first, last):
            source = np.int64(packed.ctypes.data) + (row * scale.shape[1] + group) * GROUP_BYTES
            if _count_nonzero_pairs(source) > 0:
                low, high = min(low, np.int64(scale[row, group])), max(high, np.int64(scale[row, group]))
    return low, high


@kernel
def choose_block_scales(packed: Array, scale: Array, out_scale: Array) -> int:
    """Choose the E4M3 block scales 2^(K - 6) for FP4 groups, K the largest scale exponent of the block.

    Where scales spread too far, groups of zeros (exact under any scale) are left out of K. The least byte is 1: there
    even 2^-127 groups are exact, and some decoders read byte 0 as 0.0.

    Returns:
        The worst spread, as a power of two, between K and a group that holds a non-zero value.
    """
    worst = 0
    rows, groups = scale.shape
    lows, highs = np.empty(groups, np.uint8), np.empty(groups, np.uint8)
    for block_row in range(out_scale.shape[0]):
        first_row, last_row = block_row * BLOCK, min(block_row * BLOCK + BLOCK, rows)
        _scale_range(scale, first_row, last_row, lows, highs)
        for block_column in range(out_scale.shape[1]):
            first, last = block_column * BLOCK_GROUPS, min(block_column * BLOCK_GROUPS + BLOCK_GROUPS, groups)
            low, high = np.int64(lows[first:last].min()), np.int64(highs[first:last].max())
            if high - low > min(worst, FP4_TO_FP8_SPREAD_BOUND):
                low_used, high_used = _used_scale_range(packed, scale, first_row, last_row, first, last)
                if high - low > FP4_TO_FP8_SPREAD_BOUND and high_used >= 0:
                    high = high_used
                worst = max(worst, high - low_used)
            out_scale[block_row, block_column] = max(high - E4M3_LAST_OFFSET, 1)
    return worst


@kernel
def decode_to_e4m3(packed: Array, scale: Array, block_scale: Array, values: Array, rounded: Array, out: Array) -> int:
    """FP4 -> FP8 into out [R, G*32] under given block scales; count the inexact ones.

    Args:
        values, rounded: [20, 16], by offset from TABLE_FIRST_OFFSET on, and code.
    """
    inexact = 0
    source, target = np.int64(packed.ctypes.data), np.int64(out.ctypes.data)
    for row in range(scale.shape[0]):
        for group in range(scale.shape[1]):
            offset = np.int64(scale[row, group]) - np.int64(block_scale[row // BLOCK, group // BLOCK_GROUPS])
            if E4M3_FIRST_OFFSET <= offset <= E4M3_LAST_OFFSET:
                _decode_to_e4m3(source, 0x30 + (offset << 3), target)
            else:
                # Above the last offset there are only groups of zeros (choose_block_scales).
                entry = min(max(offset - TABLE_FIRST_OFFSET, 0), values.shape[0] - 1)
                inexact += _look_up(packed, row, group, values[entry], rounded[entry], out)
            source += GROUP_BYTES
            target += GROUP
    return inexact


@kernel
def encode_bf16(
    bits: Array, like: Array, has_like: bool, out: Array, out_scale: Array, left: Array
) -> tuple[int, int, int, int]:
    """BF16 -> FP4; groups whose thresholds leave BF16's normal range are marked in `left` [R, G] and not done.

    Args:
        like: [R, G] scale bytes to use wherever they reproduce the values, if has_like.

    Returns:
        Elements changed, negative zeros lost, groups left, largest magnitude bits seen.
    """
    inexact, zeros_lost, groups_left, largest = 0, 0, 0, 0
    source, target = np.int64(bits.ctypes.data), np.int64(out.ctypes.data)
    for row in range(out_scale.shape[0]):
        for group in range(out_scale.shape[1]):
            amax = _largest_magnitude(source)
            largest = max(largest, amax)
            # block_scale's rule on bits: 6 = 1.5 x 2^2; a mantissa above 1.5 (0x40) carries into the exponent.
            rule = ((amax + 0x3F) >> 7) - 2
            if amax == 0:
                rule = ALL_ZERO_BYTE
            byte = rule
            if has_like and like[row, group] != E8M0_NAN and (amax == 0 or like[row, group] >= rule):
                byte = np.int64(like[row, group])
            if amax == 0:
                _encode_bf16(source, ANY_HALF, target)
            elif rule < ENCODE_FIRST_BYTE:
                left[row, group] = True
                groups_left += 1
            else:
                changed, lost = _encode_bf16(source, (byte - 1) << 7, target)
                if changed > 0 and byte != rule:
                    byte = rule
                    changed, lost = _encode_bf16(source, (byte - 1) << 7, target)
                inexact += changed
                zeros_lost += lost
            out_scale[row, group] = byte
            source += GROUP * 2
            target += GROUP_BYTES
    return inexact, zeros_lost, groups_left, largest
