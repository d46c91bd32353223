"""When a cast can lose bits: the sentence that a plan shows. Whether it does is counted value by value at run time."""

from v4quant.encodings import BF16, FP4, FP8, FP8_F32_SCALE, Encoding

# The 2^14 window: every E2M1 value times 2^k is an E4M3 value for -8 <= k <= 6 (facts checked exhaustively in tests).
_FP4_TO_FP8 = "if the scales of one 128x128 block spread by more than 2^14"
_TO_FP4 = "unless the values lie on an FP4 grid (all that came from FP4 do)"
_TO_FP8 = "unless the values lie on an FP8 grid (all that came from FP8 do)"
_FROM_F32_SCALE = "if an F32 scale is no power of two"

_RISKS: dict[tuple[Encoding, Encoding], str] = {
    (FP4, FP8): _FP4_TO_FP8,
    (FP4, FP8_F32_SCALE): _FP4_TO_FP8,
    (FP8, FP4): _TO_FP4,
    (FP8_F32_SCALE, FP4): _TO_FP4,
    (BF16, FP4): _TO_FP4,
    (BF16, FP8): _TO_FP8,
    (BF16, FP8_F32_SCALE): _TO_FP8,
    (FP8_F32_SCALE, FP8): _FROM_F32_SCALE,
    (FP8_F32_SCALE, BF16): _FROM_F32_SCALE,
}


def rounding_risk(source: Encoding, target: Encoding) -> str:
    """Say when this cast rounds; "" where it can not (within BF16's exponent range, which is checked as well)."""
    return _RISKS.get((source, target), "")
