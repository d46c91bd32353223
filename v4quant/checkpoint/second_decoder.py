"""A second decoder, for `verify` alone: values of stored weights by torch's own dtypes and the formats' bit fields.

It shares no table, no arithmetic and no block geometry with `numerics/` and `formats/`, by which `convert` works, so
that a mistake there cannot hide itself here:

    E4M3, E8M0, BF16    torch.float8_e4m3fn, torch.float8_e8m0fnu and torch.bfloat16, converted by torch
    E2M1                from its sign, exponent and mantissa bits (OCP Microscaling Formats v1.0, section 5.3.3)
    blocks              element [i, j] belongs to scale [i // rows, j // columns], by index, whatever divides

R rows, C columns; a stored F4-in-I8 byte holds element 2j in its low nibble and 2j+1 in its high one.
"""

import torch

# Products of an E4M3 or E2M1 code and a scale of at most this are finite in float32, and exact: few bits, and no
# product below 2^-9 x 2^-127 = 2^-136, while float32's subnormals reach 2^-149.
_LARGEST_FLOAT32_SCALE = 2.0**118


def _e2m1_pairs() -> torch.Tensor:
    """Values of both codes of every byte, low nibble first: float32 [256, 2]."""
    byte = torch.arange(256)
    code = torch.stack([byte % 16, byte // 16], dim=1)  # [256, 2]
    sign, exponent, mantissa = code // 8, code // 2 % 4, code % 2
    # Exponent bias 1; exponent 0 is subnormal: 0.mantissa instead of 1.mantissa.
    magnitude = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
    return torch.where(sign == 1, -magnitude, magnitude).to(torch.float32)


# By stored byte; a pair of float32 counts as one 64-bit element, which is looked up twice as fast.
_E2M1_PAIRS = _e2m1_pairs().view(torch.int64).reshape(-1)
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


def decode_scale(stored: torch.Tensor, dtype: str) -> torch.Tensor:
    """Values of stored block scales, any shape; float32.

    Args:
        stored: uint8 for F8_E8M0, float32 for F32.
        dtype: the header's dtype.
    """
    return stored.view(torch.float8_e8m0fnu).to(torch.float32) if dtype == "F8_E8M0" else stored


def needs_float64(scale: torch.Tensor) -> bool:
    """True where float32 may not hold every product of a code and one of these scales."""
    mantissa, _ = torch.frexp(scale)
    return bool((mantissa != 0.5).any()) or float(scale.max()) > _LARGEST_FLOAT32_SCALE


def decode_weight(codes: torch.Tensor, dtype: str, scale: torch.Tensor | None, wide: bool) -> torch.Tensor:
    """Values of stored rows, exact: float32 [R, C], or float64 if `wide`.

    Args:
        codes: uint8, the bytes as stored: [R, C/2] for I8, [R, C] for F8_E4M3, [R, 2C] for BF16.
        dtype: the header's dtype.
        scale: [R, C], the scale of each element (`spread`); None for BF16.
        wide: see needs_float64.
    """
    rows = codes.shape[0]
    if dtype == "BF16":
        values = codes.view(torch.bfloat16).to(torch.float32)
    else:
        table = _E4M3 if dtype == "F8_E4M3" else _E2M1_PAIRS
        values = table.index_select(0, codes.reshape(-1).to(torch.int32)).view(torch.float32).reshape(rows, -1)
    if wide:
        values = values.to(torch.float64)
    return values if scale is None else values.mul_(scale)


def spread(scale: torch.Tensor, first_row: int, rows: int, columns: int, block: tuple[int, int]) -> torch.Tensor:
    """The scale of each element of rows [first_row, first_row + rows): [rows, columns].

    Args:
        scale: the whole tensor's scales.
        block: rows and columns under one scale.
    """
    of_row = torch.arange(first_row, first_row + rows) // block[0]
    first_block = int(of_row[0])
    of_column = scale[first_block : int(of_row[-1]) + 1].repeat_interleave(block[1], dim=1)[:, :columns]
    return of_column.index_select(0, of_row - first_block)  # [rows, columns]
