"""The dtype names of safetensors headers: how many bits an element takes and how a file orders them.

Order: safetensors 0.8 sorts a file by dtype, then by name; the released DeepSeek files follow it.
Source of the list: the `Dtype` enumeration of safetensors 0.8, last to first.
"""

import math
from collections.abc import Sequence

DTYPE_BITS: dict[str, int] = {
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "F32": 32,
    "U32": 32,
    "I32": 32,
    "BF16": 16,
    "F16": 16,
    "U16": 16,
    "I16": 16,
    "F8_E8M0": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "F4": 4,  # its header shape is the logical one, two elements a byte
    "BOOL": 8,
}
DTYPE_RANK: dict[str, int] = {dtype: rank for rank, dtype in enumerate(DTYPE_BITS)}


def payload_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor of this header dtype and header shape occupies.

    Args:
        dtype: a key of DTYPE_BITS.
        shape: the header's shape; for F4 the logical one.

    Raises:
        ValueError: if an F4 tensor has an odd number of elements, which no whole number of bytes holds.
    """
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} is not a whole number of bytes")
    return bits // 8
