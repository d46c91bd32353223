"""`native`: DeepSeek-V4 as released. Routed experts in FP4, every other quantised matrix in FP8.

Routed expert [out, in]: `.weight` I8 [out, in/2], two E2M1 codes a byte, even column in the low nibble;
`.scale` F8_E8M0 [out, in/32]. Other matrix [out, in]: `.weight` F8_E4M3 [out, in]; `.scale` F8_E8M0
[ceil(out/128), ceil(in/128)]. Value = code x scale.
"""

from v4quant.encodings import NATIVE_SCHEME
from v4quant.formats.format import FP8_QUANTIZATION_CONFIG, Format

FORMAT = Format(
    scheme=NATIVE_SCHEME,
    expert_dtype="fp4",
    quantization_config=FP8_QUANTIZATION_CONFIG,
    inference={"dtype": "fp8", "scale_fmt": "ue8m0", "expert_dtype": "fp4"},
    summary="FP4 experts, FP8 elsewhere, as released",
)
