"""The arithmetic of a run: what is rounded on the way, and how matrix products are summed.

Why products of decoded operands are the release's arithmetic: an E4M3 activation times its power-of-two scale is a BF16
number, and so is every E4M3 or E2M1 weight times its scale. A BF16 matrix product with FP32 sums therefore adds exactly
the terms that the released kernels add, in another order; nothing else differs.
"""

from dataclasses import dataclass
from enum import StrEnum


class Activations(StrEnum):
    """What happens to activations before a matrix that some release quantises."""

    RELEASE = "release"
    """Rounded to FP8 as DeepSeek's inference code does, however the weight is stored."""

    STORED = "stored"
    """As the stored format would be run: rounded before FP4 and FP8 weights, left alone before BF16 ones."""

    NONE = "none"
    """No rounding at all, KV entries and indexer included, everything in FP32: for comparison with other code only."""


class Products(StrEnum):
    """How quantised matrix products are computed."""

    DECODED = "decoded"
    """Operands decoded to BF16, one BF16 product with FP32 sums: fast on CPUs."""

    CODED = "coded"
    """Operands as stored, through the kernels: FP32 sums of 128 columns are scaled and added, as in the release."""


@dataclass(frozen=True)
class Arithmetic:
    """Both choices; the defaults are those of every command on a CPU."""

    activations: Activations = Activations.RELEASE
    products: Products = Products.DECODED
