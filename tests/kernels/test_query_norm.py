"""query_norm_, the torch reference: step by step in float64, a case where each rounding shows, and its refusals."""

from fractions import Fraction

import pytest
import torch

from v4quant.kernels.query_norm import query_norm_
from v4quant.testing.tensors import every_finite_bf16


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).double()


@pytest.mark.parametrize("dims", [1, 100, 512])
def test_agrees_with_float64_step_by_step(dims: int) -> None:
    random = torch.Generator().manual_seed(dims)
    q = (torch.randn(9, 7, dims, generator=random) * torch.logspace(-3, 3, 9)[:, None, None]).to(torch.bfloat16)
    y = q.double()
    mean = rounded(rounded(y * y).mean(-1, keepdim=True))
    expected = (y * rounded(1 / rounded(mean + rounded(torch.tensor(1e-6))).sqrt())).to(torch.bfloat16)
    assert query_norm_(q, 1e-6) is q
    assert torch.equal(q, expected)


def test_a_head_does_not_depend_on_how_many_there_are() -> None:
    q = torch.randn(37, 1, 8, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    alone = torch.cat([query_norm_(q[head : head + 1].clone(), 1e-6) for head in range(37)])
    assert torch.equal(query_norm_(q, 1e-6), alone)


def test_by_hand() -> None:
    """The mean of 4, 4, 4, 4 is 4; a head of zeros stays, signs too."""
    q = torch.tensor([[[2.0, -2.0, 2.0, 2.0], [0.0, -0.0, 0.0, 0.0]]], dtype=torch.bfloat16)
    query_norm_(q, 2.0**-40)
    assert q.tolist() == [[[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]]
    assert torch.signbit(q[0, 1]).tolist() == [False, True, False, False]


def test_no_root_is_near_a_tie() -> None:
    """Devices give rsqrt within 2^-22 of it; a BF16 root 2^-20 or nearer to a tie between two would be in doubt."""
    means = every_finite_bf16(65280)[0]
    means = means[means > 0].double()
    root = 1 / means.sqrt()
    step = 2.0 ** (torch.frexp(root).exponent.double() - 8)
    from_tie = (root / step % 1 - 0.5).abs() * step / root
    assert float(from_tie.min()) > 2.0**-20
    # The two significands of even and odd exponents repeat; one is checked in exact arithmetic.
    nearest = int(from_tie.argmin())
    tie = Fraction(float((root[nearest] / step[nearest]).floor() + 0.5)) * Fraction(float(step[nearest]))
    assert abs(tie * tie * Fraction(float(means[nearest])) - 1) > Fraction(1, 2**20)


@pytest.mark.parametrize(
    ("q", "error", "message"),
    [
        (torch.zeros(2, 3, 8), TypeError, "q is torch.float32"),
        (torch.zeros(2, 8, dtype=torch.bfloat16), ValueError, r"q has shape \[2, 8\]"),
        (torch.zeros(2, 3, 8, dtype=torch.bfloat16).transpose(0, 1), ValueError, "q is not contiguous"),
        (torch.zeros(2, 3, 0, dtype=torch.bfloat16), ValueError, "q has 0 dims a head"),
        (torch.zeros(1, 1, 8193, dtype=torch.bfloat16), ValueError, "q has 8193 dims a head"),
    ],
)
def test_refusals(q: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        query_norm_(q, 1e-6)
