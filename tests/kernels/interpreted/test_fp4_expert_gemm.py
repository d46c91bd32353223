"""fp4_expert_gemm: every path and tile against the reference, empty experts, -1, one token, poison, every FP4 code."""

from typing import Any

import pytest
import torch

from v4quant.kernels._fp4_expert_gemm_triton import launch
from v4quant.kernels._gemm_launch import GemmLaunch
from v4quant.kernels.expert_order import sort_by_expert
from v4quant.kernels.fp4_expert_gemm import ExpertWeights, fp4_expert_gemm, fp4_expert_gemm_torch
from v4quant.testing.quantized import activations, experts, picks

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LIMIT = 10.0
LAUNCHES = {
    "fp4": [("upcast", 16, 128), ("upcast", 32, 64), ("scaled", 16, 128), ("scaled", 32, 128)],
    "fp8": [("fp8", 16, 128), ("fp16", 32, 128)],
    "fp8 float32 scales": [("fp8", 16, 128)],
}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums in another order round a few of h's E4M3 codes and of the BF16 outputs the other way, and no more."""
    assert bool(found.isfinite().all())
    assert float((found - expected).norm()) <= 5e-4 * float(expected.norm())
    assert int((found != expected).sum()) <= 0.02 * found.numel()


@pytest.mark.parametrize(
    ("kind", "choice"), [(kind, choice) for kind, choices in LAUNCHES.items() for choice in choices], ids=str
)
def test_every_launch(kind: str, choice: tuple[str, int, int]) -> None:
    path, block_tokens, block_k = choice
    weights = ExpertWeights(*experts(kind, 5, 128, 256))
    tokens = block_tokens + 13
    codes, scale = activations(tokens, 256)
    indices, router = picks(tokens, 3, 5)
    indices[4, 1] = indices[9] = -1
    # Expert 0 has rows for several tiles, the last of them not full.
    indices[10:] = torch.tensor([0, 1, -1])
    order = sort_by_expert(indices, router, 5)
    assert int(order.offset[1]) > block_tokens
    tiles = GemmLaunch(path, block_tokens, 128, block_k, 4, 1)
    found = launch(codes, scale, order, weights.matrices, LIMIT, tiles)
    assert_close(found, fp4_expert_gemm_torch(codes, scale, order, weights, LIMIT))
    assert torch.equal(found[9], torch.zeros(256))


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
@pytest.mark.parametrize(
    ("tokens", "slots", "count", "width", "hidden"), [(2, 2, 4, 384, 256), (0, 2, 4, 128, 128), (33, 1, 3, 256, 128)]
)
def test_sizes(kind: str, tokens: int, slots: int, count: int, width: int, hidden: int) -> None:
    weights = ExpertWeights(*experts(kind, count, width, hidden))
    codes, scale = activations(tokens, hidden)
    order = sort_by_expert(*picks(tokens, slots, count), count)
    found = fp4_expert_gemm(codes, scale, order, weights, LIMIT)
    assert_close(found, fp4_expert_gemm_torch(codes, scale, order, weights, LIMIT))


def test_one_expert_and_none_at_all() -> None:
    weights = ExpertWeights(*experts("fp4", 1, 128, 128))
    codes, scale = activations(3, 128)
    order = sort_by_expert(torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1), 1)
    expected = fp4_expert_gemm_torch(codes, scale, order, weights, LIMIT)
    assert_close(fp4_expert_gemm(codes, scale, order, weights, LIMIT), expected)
    nowhere = sort_by_expert(torch.full((3, 2), -1), torch.ones(3, 2), 1)
    assert torch.equal(fp4_expert_gemm(codes, scale, nowhere, weights, LIMIT), torch.zeros(3, 128))


@pytest.mark.parametrize(("path", "block_k"), [("upcast", 128), ("upcast", 64), ("scaled", 128)])
def test_every_code_and_scale_in_its_place(path: str, block_k: int) -> None:
    # With gates beyond the limit and one token for each input column, up is w3 itself: any column that meets another
    # column's code or scale shows.
    columns = torch.arange(128)
    random = torch.Generator().manual_seed(11)
    packed = torch.randint(0, 256, (1, 128, 64), generator=random, dtype=torch.uint8)
    scale = torch.randint(120, 128, (1, 128, 4), generator=random, dtype=torch.uint8)
    gate = torch.full((1, 128, 64), 0x77, dtype=torch.uint8)  # 6 twice
    gate_scale = torch.full((1, 128, 4), 130, dtype=torch.uint8)
    # Down is the unit matrix: 1 in its place.
    unit = torch.zeros(1, 128, 64, dtype=torch.uint8)
    unit[0, columns, columns // 2] = torch.where(columns % 2 == 0, 0x02, 0x20).to(torch.uint8)
    ones = torch.full((1, 128, 4), 127, dtype=torch.uint8)
    weights = ExpertWeights(gate, gate_scale, packed, scale, unit, ones)
    codes = torch.eye(128).to(torch.float8_e4m3fn)
    order = sort_by_expert(torch.zeros(128, 1, dtype=torch.int64), torch.ones(128, 1), 1)
    x_scale = torch.full((128, 1), 127, dtype=torch.uint8)
    found = launch(codes, x_scale, order, weights.matrices, LIMIT, GemmLaunch(path, 32, 128, block_k, 4, 1))
    assert torch.equal(found, fp4_expert_gemm_torch(codes, x_scale, order, weights, LIMIT))
    assert len(set(found.flatten().tolist())) > 20


def test_what_no_expert_needs_is_not_used() -> None:
    weights = ExpertWeights(*experts("fp8", 4, 128, 128))
    codes, scale = activations(20, 128)
    indices, router = picks(20, 2, 4)
    indices[6] = -1
    order = sort_by_expert(indices, router, 4)
    expected = fp4_expert_gemm_torch(codes, scale, order, weights, LIMIT)
    codes.view(torch.uint8)[6] = 0x7F
    router[6] = float("nan")
    order = sort_by_expert(indices, router, 4)
    for empty in (2, 3):
        for weight in (weights.w1, weights.w2, weights.w3):
            weight.view(torch.uint8)[empty] = 0x7F
    assert_close(fp4_expert_gemm(codes, scale, order, weights, LIMIT), expected)


def test_equal_bits_in_another_order_of_tokens() -> None:
    weights = ExpertWeights(*experts("fp4", 5, 128, 128))
    codes, scale = activations(30, 128)
    indices, router = picks(30, 3, 5)
    found = fp4_expert_gemm(codes, scale, sort_by_expert(indices, router, 5), weights, LIMIT)
    turned = torch.arange(29, -1, -1)
    codes = codes.view(torch.uint8)[turned].view(codes.dtype)
    order = sort_by_expert(indices[turned], router[turned], 5)
    assert torch.equal(fp4_expert_gemm(codes, scale[turned], order, weights, LIMIT)[turned], found)


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_rows_without_an_expert_are_not_written(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiles that are not full end before them, as they must before the rows of the next expert.
    made: list[torch.Tensor] = []
    empty = torch.empty

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(empty(*args, **kwargs))
        return made[-1]

    weights = ExpertWeights(*experts(kind, 2, 128, 128))
    codes, scale = activations(30, 128)
    indices = torch.full((30, 1), -1)
    indices[:7] = 0
    order = sort_by_expert(indices, torch.ones(30, 1), 2)
    monkeypatch.setattr(torch, "empty", recorded)
    fp4_expert_gemm(codes, scale, order, weights, LIMIT)
    scratch = [tensor for tensor in made if tensor.dtype in (torch.uint8, torch.uint16)]
    assert [list(tensor.shape) for tensor in scratch] == [[30, 128], [30, 1], [30, 128]]
    for tensor in scratch:
        assert bool((tensor[7:].view(torch.uint8) == 255).all())
        assert bool((tensor[:7].view(torch.uint8) != 255).any())
