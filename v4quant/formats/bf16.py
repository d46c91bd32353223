"""`bf16`: no quantised matrix and no scale; what training code and transformers load without a quantiser.

Every matrix [out, in]: `.weight` BF16 [out, in]. config.json has neither `quantization_config` nor `expert_dtype`:
loaders that find `quant_method: fp8` would look for scales.
"""

from v4quant.encodings import BF16_SCHEME
from v4quant.formats.format import Format

FORMAT = Format(
    scheme=BF16_SCHEME,
    expert_dtype=None,
    quantization_config=None,
    inference={"dtype": "bf16", "expert_dtype": None},
    summary="BF16 everywhere, no scales",
)
