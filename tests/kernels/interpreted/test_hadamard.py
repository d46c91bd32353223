"""hadamard: bit-equal to the reference, whose sums run in the same order; odd sizes, one row, none."""

import pytest
import torch

from v4quant.kernels._hadamard_triton import rows_per_program
from v4quant.kernels.hadamard import hadamard, hadamard_torch

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(("rows", "dims"), [(67, 128), (1, 128), (0, 128), (3, 8), (5, 1024), (2, 4096)])
def test_equals_the_reference(rows: int, dims: int) -> None:
    random = torch.Generator().manual_seed(dims + rows)
    x = (torch.randn(rows, dims, generator=random) * torch.logspace(-20, 20, rows)[:, None]).to(torch.bfloat16)
    assert torch.equal(hadamard(x).view(torch.int16), hadamard_torch(x).view(torch.int16))


def test_rows_per_program() -> None:
    assert [rows_per_program(dims) for dims in (8, 128, 4096)] == [512, 32, 1]
