"""E2M1 (FP4): sign, two exponent bits, one mantissa bit; two codes a byte, the even column in the low nibble.

Source: OCP Microscaling Formats (MX) v1.0, section 5.3.3. The nibble order is that of the DeepSeek-V4 releases.
"""

import numpy as np
import numpy.typing as npt

from v4quant.numerics.rounding import round_to_nearest_even

E2M1_MAX = 6.0
_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1_VALUES: npt.NDArray[np.float64] = np.concatenate([_MAGNITUDES, -_MAGNITUDES])  # code 8 is -0


def unpack(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Split bytes [..., n] into codes [..., 2n], low nibble first."""
    codes = np.stack([packed & np.uint8(0xF), packed >> np.uint8(4)], axis=-1)
    return codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Join codes [..., 2n] into bytes [..., n], low nibble first."""
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def encode(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Codes of the nearest E2M1 numbers: ties to even, saturating at 6, sign of zero kept. Values are finite."""
    rounded = round_to_nearest_even(values, significand_bits=2, least_exponent=0, largest=E2M1_MAX)
    codes = np.searchsorted(_MAGNITUDES, np.abs(rounded)).astype(np.uint8)
    return np.where(np.signbit(values), codes | np.uint8(8), codes)
