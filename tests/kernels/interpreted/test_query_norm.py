"""query_norm_: bit-equal where the sum is exact; odd sizes, one head, none, and not a byte written outside."""

import pytest
import torch

from v4quant.kernels.query_norm import query_norm_, query_norm_torch_
from v4quant.testing.tensors import every_finite_bf16


@pytest.mark.parametrize(
    ("tokens", "heads", "dims"), [(5, 7, 512), (1, 1, 512), (0, 4, 512), (3, 5, 96), (1, 3, 1), (40, 3, 64)]
)
def test_equals_the_reference(tokens: int, heads: int, dims: int) -> None:
    random = torch.Generator().manual_seed(tokens)
    memory = torch.full((tokens + 2, heads, dims), 5.0, dtype=torch.bfloat16)  # before and behind: must stay 5
    scale = torch.logspace(-4, 4, tokens)[:, None, None]
    memory[1:-1] = (torch.randn(tokens, heads, dims, generator=random) * scale).to(torch.bfloat16)
    expected = memory.clone()
    query_norm_torch_(expected[1:-1], 1e-6)
    q = memory[1:-1]
    assert query_norm_(q, 1e-6) is q
    # Another order of a sum may move a whole head; these seeds have none.
    assert torch.equal(memory.view(torch.int16), expected.view(torch.int16))


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # to infinity, as on devices
def test_every_bf16_beside_a_one() -> None:
    """Sums of two squares are the same in any order: all bits, from subnormals to where squares overflow."""
    finite = every_finite_bf16(65280)[0]
    q = torch.stack([finite, torch.ones_like(finite)], -1).view(-1, 64, 2)
    expected = query_norm_torch_(q.clone(), 1e-6)
    assert torch.equal(query_norm_(q, 1e-6).view(torch.int16), expected.view(torch.int16))
