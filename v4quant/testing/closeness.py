"""Closeness of results that may differ in the order of FP32 sums only."""

import torch


def bf16_steps(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How many BF16 numbers apart two finite bfloat16 tensors are, element by element: int32; 0 and -0 are 0 apart."""

    def ordinal(x: torch.Tensor) -> torch.Tensor:
        bits = x.view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordinal(actual) - ordinal(expected)).abs()


def assert_bf16_close(actual: torch.Tensor, expected: torch.Tensor, share: float = 1e-3) -> None:
    """Require finite bfloat16 values at most one BF16 number apart, and most of them equal.

    Args:
        actual: bfloat16.
        expected: bfloat16 of the same shape.
        share: of elements that may differ at all. A sum in another order is off by about 2^-23 of its terms, and
            changes the rounding to BF16, whose steps are 2^-8, of about one element in 10,000.

    Raises:
        AssertionError: with the number that differ and the first that is too far.
    """
    assert actual.dtype == expected.dtype == torch.bfloat16, f"{actual.dtype} against {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert bool(actual.isfinite().all()) and bool(expected.isfinite().all()), "a value is not finite"
    steps = bf16_steps(actual, expected)
    far = (steps > 1).nonzero()
    if len(far):
        where = tuple(far[0].tolist())
        raise AssertionError(f"{len(far)} too far, first at {list(where)}: {actual[where]}, expected {expected[where]}")
    differing = int((steps > 0).sum())
    assert differing <= share * max(steps.numel(), 1000), f"{differing} of {steps.numel()} differ, expected {share:.2%}"
