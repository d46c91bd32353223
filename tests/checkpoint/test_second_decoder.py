"""The decoder of `verify`: exhaustive against ml_dtypes, by index at block edges, and independent of the converter."""

import ast
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from v4quant.checkpoint import compare, second_decoder
from v4quant.checkpoint.second_decoder import decode_scale, decode_weight, needs_float64, spread

BYTES = torch.arange(256, dtype=torch.uint8)
FINITE_BYTES = BYTES[:255]


def assert_same(actual: torch.Tensor, expected: npt.NDArray[np.float64]) -> None:
    """Equal values and equal signs of zero; NaN equals NaN."""
    np.testing.assert_array_equal(actual.double().numpy(), expected)
    np.testing.assert_array_equal(np.signbit(actual.numpy()), np.signbit(expected))


def test_every_e8m0_byte() -> None:
    expected = BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert_same(decode_scale(BYTES, "F8_E8M0"), expected)


@pytest.mark.parametrize("wide", [False, True])
def test_every_e4m3_byte_under_every_scale(wide: bool) -> None:
    scale = decode_scale(FINITE_BYTES[:246] if not wide else FINITE_BYTES, "F8_E8M0")[:, None]
    codes = BYTES.repeat(len(scale), 1)
    codes[:, [0x7F, 0xFF]] = 0  # NaN, compared below
    found = decode_weight(codes, "F8_E4M3", scale.expand(codes.shape).clone(), wide)
    expected = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale.double().numpy()
    assert_same(found, expected)
    nan = torch.tensor([[0x7F, 0xFF]], dtype=torch.uint8)
    assert decode_weight(nan, "F8_E4M3", torch.ones(1, 2), wide).isnan().all()


@pytest.mark.parametrize("wide", [False, True])
def test_every_pair_of_e2m1_codes_under_every_scale(wide: bool) -> None:
    scale = decode_scale(FINITE_BYTES[:246] if not wide else FINITE_BYTES, "F8_E8M0")[:, None]
    found = decode_weight(BYTES.repeat(len(scale), 1), "I8", scale.expand(-1, 512).clone(), wide)
    nibbles = np.stack([BYTES.numpy() & 15, BYTES.numpy() >> 4], axis=1).reshape(1, 512)
    expected = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale.double().numpy()
    assert_same(found, expected)


def test_every_bf16_pattern() -> None:
    bits = np.arange(65536, dtype=np.uint16)[None]
    found = decode_weight(torch.from_numpy(bits.view(np.uint8)), "BF16", None, False)
    np.testing.assert_array_equal(found.numpy(), bits.view(ml_dtypes.bfloat16).astype(np.float32))


def test_float32_is_refused_where_it_would_not_be_exact() -> None:
    assert not needs_float64(torch.tensor([[2.0**-127, 2.0**118]]))
    assert needs_float64(torch.tensor([[1.0, 2.0**119]]))  # 448 x 2^120 is beyond float32
    assert needs_float64(torch.tensor([[1.0, 1.5]]))
    assert needs_float64(torch.tensor([[1.0, 1 + 2.0**-23]]))


@pytest.mark.parametrize("block", [(1, 32), (128, 128)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (128, 128), (300, 320), (129, 32), (257, 416)])
def test_each_element_has_the_scale_of_its_block(block: tuple[int, int], rows: int, columns: int) -> None:
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    scale = torch.arange(grid[0] * grid[1], dtype=torch.float32).reshape(grid)
    for first in (0, rows // 3, rows - 1):
        found = spread(scale, first, rows - first, columns, block)
        expected = [[scale[i // block[0], j // block[1]] for j in range(columns)] for i in range(first, rows)]
        assert torch.equal(found, torch.tensor(expected))


@pytest.mark.parametrize("module", [second_decoder, compare])
def test_shares_no_code_with_the_converter(module: object) -> None:
    path = Path(str(vars(module)["__file__"]))
    imported = {
        node.module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    }
    converter = ("v4quant.numerics", "v4quant.formats", "v4quant.encodings", "v4quant.checkpoint.stream")
    assert not [name for name in imported if name and name.startswith(converter)]
