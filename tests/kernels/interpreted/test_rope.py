"""rope_: bit-equal to the reference; odd sizes, one token, none, and not a byte written outside."""

import pytest
import torch

from v4quant.kernels.rope import rope_, rope_torch_
from v4quant.kernels.rope_frequencies import rope_frequencies, rope_table

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "dims", "rope_dims"),
    [(5, 7, 128, 64), (1, 1, 512, 64), (0, 4, 512, 64), (40, 1, 64, 64), (3, 5, 96, 2)],
)
def test_equals_the_reference(tokens: int, heads: int, dims: int, rope_dims: int, inverse: bool) -> None:
    random = torch.Generator().manual_seed(tokens)
    memory = torch.full((tokens + 2, heads, dims), 5.0, dtype=torch.bfloat16)  # before and behind: must stay 5
    memory[1:-1] = torch.randn(tokens, heads, dims, generator=random).to(torch.bfloat16)
    table = rope_table(torch.arange(tokens) * 1013, rope_frequencies(rope_dims, 160000.0))
    expected = memory.clone()
    rope_torch_(expected[1:-1], table, inverse)
    x = memory[1:-1]
    assert rope_(x, table, inverse) is x
    assert torch.equal(memory.view(torch.int16), expected.view(torch.int16))
