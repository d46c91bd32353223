"""RMS normalisation of each head of the queries, without a learned gain, rounded to BF16 at every step.

    q = bf16(q * bf16(rsqrt(bf16(bf16(mean(bf16(q ** 2))) + bf16(eps)))))        the mean's sum is FP32

T tokens, H heads, D dims a head (512). Source: `Attention.forward` of DeepSeek's released inference code, whose
`q *= torch.rsqrt(q.square().mean(-1, keepdim=True) + self.eps)` runs on BF16 tensors (torch adds BF16 of eps on CPUs,
FP32 on GPUs; the difference needs a mean near eps to show). rms_norm with a gain of one is
another operation: it rounds once, and about half of its results are other BF16 numbers.
"""

from collections.abc import Callable

import torch

from v4quant.kernels._backend import require, use_triton

# One program holds a head whole.
MAX_DIMS = 8192
# From something of some heads, [T, H, 1], to that of all heads, [T, A, 1], and which of them those are.
OfAllHeads = Callable[[torch.Tensor], tuple[torch.Tensor, slice]]


def query_norm_torch_(q: torch.Tensor, eps: float, of_all: OfAllHeads | None = None) -> torch.Tensor:
    """Reference for query_norm_: same arguments, any device; equal up to the order of the FP32 sum."""
    # The released expression itself. On CPUs torch rounds the square root too, before it divides, for the elements left
    # over behind the last full vector of 32, in each thread's share. It is kept, because outputs of the released code
    # on a CPU have it; queries in pieces of 128 with 64 or 128 heads leave none over, and are one thread's share.
    mean = q.square().mean(-1, keepdim=True)  # [T, H, 1]
    if of_all is None:
        q *= torch.rsqrt(mean + eps)
    else:  # which elements are left over is decided by all heads
        every, own = of_all(mean)
        q *= torch.rsqrt(every + eps)[:, own]
    return q


def query_norm_(q: torch.Tensor, eps: float, of_all: OfAllHeads | None = None) -> torch.Tensor:
    """Normalise each head in place.

    Another order of the mean's FP32 sum moves the mean to the next BF16 number in about one head of 10,000, and that
    whole head with it; nothing else is free.

    Args:
        q: bfloat16 [T, H, D], finite, contiguous; D up to 8192.
        eps: added to the mean square; positive.
        of_all: where q has some of a model's heads, shows what it is given of all of them; bits are then those that
            they have together.

    Returns:
        q itself.

    Raises:
        TypeError: if q is not bfloat16.
        ValueError: if q has another number of dimensions, is not contiguous, or a head is empty or too wide.
    """
    require("q", q, torch.bfloat16, (None, None, None))
    if not 1 <= q.shape[2] <= MAX_DIMS:
        raise ValueError(f"q has {q.shape[2]} dims a head, expected 1 to {MAX_DIMS}")
    if not use_triton(q):
        return query_norm_torch_(q, eps, of_all)
    from v4quant.kernels._query_norm_triton import launch_

    return launch_(q, float(torch.tensor(eps, dtype=torch.bfloat16)))
