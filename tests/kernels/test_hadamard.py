"""hadamard, the torch reference: against the matrix in float64, its rows by hand, and its refusals."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from v4quant.kernels.hadamard import hadamard
from v4quant.testing.closeness import assert_bf16_close


def sylvester(dims: int) -> npt.NDArray[np.float64]:
    matrix = np.ones((1, 1))
    while len(matrix) < dims:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


@pytest.mark.parametrize("dims", [8, 64, 128, 512, 4096])
def test_agrees_with_the_matrix_in_float64(dims: int) -> None:
    x = torch.randn(9, dims, generator=torch.Generator().manual_seed(dims)).to(torch.bfloat16)
    expected = x.double().numpy() @ sylvester(dims) * dims**-0.5
    # Near zero large terms cancel, and steps of BF16 say little: one FP32 rounding of the terms is allowed besides.
    error = np.abs(hadamard(x).double().numpy() - expected)
    assert (error <= np.abs(expected) * 2.0**-8 + 2.0**-20).all()
    assert_bf16_close(hadamard(x)[:, :1], torch.tensor(expected[:, :1]).to(torch.bfloat16))


def test_unit_vectors_give_rows_in_sylvesters_order() -> None:
    found = hadamard(torch.eye(64, dtype=torch.bfloat16))
    np.testing.assert_array_equal(found.float().numpy(), sylvester(64) / 8)


def test_no_rows() -> None:
    assert hadamard(torch.zeros(0, 128, dtype=torch.bfloat16)).shape == (0, 128)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 128), TypeError, "x is torch.float32"),
        (torch.zeros(2, 96, dtype=torch.bfloat16), ValueError, "96 columns, expected a power of two"),
        (torch.zeros(2, 4, dtype=torch.bfloat16), ValueError, "4 columns"),
        (torch.zeros(2, 8192, dtype=torch.bfloat16), ValueError, "8192 columns"),
        (torch.zeros(2, 3, 128, dtype=torch.bfloat16), ValueError, "x has shape"),
    ],
)
def test_refusals(x: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hadamard(x)
