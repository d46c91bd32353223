"""The decoder of `verify`: exhaustive against ml_dtypes, by index at block edges, and independent of the converter."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

import v4quant
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


def imports_of(path: Path) -> Iterator[str]:
    """Every dotted name that a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


CONVERTER = ("v4quant.numerics", "v4quant.formats", "v4quant.checkpoint.stream", "v4quant.checkpoint.plan")
# A sharded folder is put together before it is decoded; what that casts has a hash of the original to agree with.
SHARDED = "v4quant.checkpoint.sharding"


@pytest.mark.parametrize("module", [second_decoder, compare])
def test_shares_no_code_with_the_converter(module: ModuleType) -> None:
    """Neither do the modules that it builds on, all the way down."""
    package = Path(v4quant.__file__).parent
    assert module.__file__
    left, seen = [Path(module.__file__)], set[Path]()
    direct = set(imports_of(left[0]))
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports_of(path):
            assert not name.startswith(CONVERTER), f"{path.name} imports {name}"
            parts = name.split(".")
            if name.startswith(SHARDED):
                continue
            candidates = [package.joinpath(*parts[1:end]).with_suffix(".py") for end in (len(parts), len(parts) - 1)]
            left += [candidate for candidate in candidates if parts[0] == "v4quant" and candidate.is_file()]
    assert not [name for name in direct if name.startswith("v4quant.encodings")]  # its own block sizes
    assert (package / "checkpoint" / "header.py" in seen) == (module is compare)  # the walk does walk
