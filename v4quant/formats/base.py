"""`base`: the Base releases. FP8 everywhere like `fp8`, but block scales are F32.

Every quantised matrix [out, in]: `.weight` F8_E4M3 [out, in]; `.scale` F32 [ceil(out/128), ceil(in/128)]. The scales
are believed to be powers of two; nobody proved it, so each is checked before it is written as E8M0. config.json says
`scale_fmt: ue8m0` all the same, hence the scale dtype is told from headers alone.
"""

from v4quant.encodings import BASE_SCHEME
from v4quant.formats.format import FP8_QUANTIZATION_CONFIG, Format

FORMAT = Format(
    scheme=BASE_SCHEME,
    expert_dtype="fp8",
    quantization_config=FP8_QUANTIZATION_CONFIG,
    inference={"dtype": "fp8", "scale_fmt": "ue8m0", "expert_dtype": None},
    summary="FP8 everywhere, F32 block scales, as the Base releases",
)
