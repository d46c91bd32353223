"""E8M0: a scale byte b is 2^(b - 127); byte 255 is NaN, byte 0 the float32 subnormal 2^-127.

Source: OCP Microscaling Formats (MX) v1.0, section 5.4.1. Decoders that shift the byte into a float32 exponent read
byte 0 as 0.0 and 255 as infinity; v4quant reads what the specification and torch say.
"""

import numpy as np
import numpy.typing as npt

E8M0_BIAS = 127
E8M0_NAN = 255
E8M0_LARGEST = 254
E8M0_VALUES: npt.NDArray[np.float64] = np.append(np.ldexp(1.0, np.arange(E8M0_NAN) - E8M0_BIAS), np.nan)

_F32_MANTISSA_BITS = 23
_F32_MANTISSA_MASK = 0x7FFFFF
_F32_OF_BYTE_0 = 0x400000  # 2^-127


def from_float32(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8] | None:
    """Bytes of float32 scales; None unless every one is a power of two within E8M0's range.

    Args:
        scale: float32, finite and positive (finite.check_f32_scale), any shape.
    """
    bits = scale.view(np.uint32)
    normal = (bits & _F32_MANTISSA_MASK) == 0
    if not np.all((normal & (bits != 0)) | (bits == _F32_OF_BYTE_0)):
        return None
    return (bits >> _F32_MANTISSA_BITS).astype(np.uint8)
