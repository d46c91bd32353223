"""`fp8`: routed experts in FP8 too, in the form of the other FP8 matrices.

Every quantised matrix [out, in]: `.weight` F8_E4M3 [out, in]; `.scale` F8_E8M0 [ceil(out/128), ceil(in/128)].
DeepSeek's inference code takes experts for FP8 where inference/config.json has no `expert_dtype`.
"""

from v4quant.encodings import FP8_SCHEME
from v4quant.formats.format import FP8_QUANTIZATION_CONFIG, Format

FORMAT = Format(
    scheme=FP8_SCHEME,
    expert_dtype="fp8",
    quantization_config=FP8_QUANTIZATION_CONFIG,
    inference={"dtype": "fp8", "scale_fmt": "ue8m0", "expert_dtype": None},
    summary="FP8 everywhere, E8M0 block scales",
)
