"""hyper_mix: gates within FP32 bounds of the references, combine bit-equal; odd sizes, one token, none, NaN behind."""

from typing import Any

import pytest
import torch

from v4quant.kernels._hyper_mix_triton import ProjectLaunch, plan
from v4quant.kernels._hyper_streams_triton import dims_per_program
from v4quant.kernels.hyper_mix import (
    hyper_collapse,
    hyper_collapse_torch,
    hyper_combine,
    hyper_combine_torch,
    hyper_mix,
    hyper_mix_torch,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS: Any = {"norm_eps": 1e-6, "eps": 1e-6}
# The last has more than one split, and neither splits nor tiles come out even.
SHAPES = [(1, 4, 64), (37, 4, 48), (5, 2, 16), (2, 8, 32), (0, 4, 64), (3, 4, 1040)]


def followed_by_nan(x: torch.Tensor) -> torch.Tensor:
    """The same values, with NaN in the memory behind them."""
    memory = torch.full((x.numel() + 4096,), torch.nan, dtype=x.dtype)
    memory[: x.numel()] = x.flatten()
    return memory[: x.numel()].view(x.shape)


def inputs(tokens: int, streams: int, dims: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(dims)
    rows = 2 * streams + streams**2
    return {
        "x": followed_by_nan(torch.randn(tokens, streams, dims, generator=random).to(torch.bfloat16)),
        "fn": followed_by_nan(torch.randn(rows, streams * dims, generator=random) * (streams * dims) ** -0.5),
        "scale": torch.tensor([0.7, 1.1, 1.9]),
        "base": followed_by_nan(torch.randn(rows, generator=random)),
    }


@pytest.mark.parametrize(("tokens", "streams", "dims"), SHAPES)
def test_mix_equals_the_reference(tokens: int, streams: int, dims: int) -> None:
    given = inputs(tokens, streams, dims)
    y, post, comb = hyper_mix(**given, **EPS, iterations=20)
    expected, expected_post, expected_comb = hyper_mix_torch(**given, **EPS, iterations=20)
    torch.testing.assert_close(post, expected_post, rtol=3e-6, atol=0)
    torch.testing.assert_close(comb, expected_comb, rtol=1e-5, atol=0)
    # One BF16 step, and where large terms cancel a few FP32 roundings of them.
    torch.testing.assert_close(y, expected, rtol=2.0**-7, atol=1e-5)
    assert int((y != expected).sum()) <= max(1, y.numel() // 500)


@pytest.mark.parametrize("iterations", [1, 2])
def test_few_iterations(iterations: int) -> None:
    given = inputs(3, 4, 32)
    comb, expected = (op(**given, **EPS, iterations=iterations)[2] for op in (hyper_mix, hyper_mix_torch))
    torch.testing.assert_close(comb, expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize(("tokens", "streams", "dims"), SHAPES)
def test_combine_equals_the_reference(tokens: int, streams: int, dims: int) -> None:
    random = torch.Generator().manual_seed(tokens)
    x = inputs(tokens, streams, dims)["x"]
    f = followed_by_nan(torch.randn(tokens, dims, generator=random).to(torch.bfloat16))
    post, comb = torch.rand(tokens, streams, generator=random), torch.rand(tokens, streams, streams, generator=random)
    found, expected = (op(f, x, post, comb) for op in (hyper_combine, hyper_combine_torch))
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(("tokens", "streams", "dims"), SHAPES)
def test_collapse_equals_the_reference(tokens: int, streams: int, dims: int) -> None:
    given = inputs(tokens, streams, dims)
    arguments = (given["x"], given["fn"][:streams], given["scale"][:1], given["base"][:streams])
    found, expected = (op(*arguments, **EPS) for op in (hyper_collapse, hyper_collapse_torch))
    torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=1e-5)
    assert int((found != expected).sum()) <= max(1, found.numel() // 500)


def test_plan() -> None:
    assert plan(1, 24, "sm_90") == ProjectLaunch(16, 32, 64, "tf32x3", num_warps=4, num_stages=3)
    assert plan(4096, 24, "sm_100") == ProjectLaunch(64, 32, 32, "tf32x3", num_warps=4, num_stages=3)
    assert plan(4096, 4, "gfx942") == ProjectLaunch(64, 16, 64, "ieee", num_warps=4, num_stages=3)
    assert [dims_per_program(dims) for dims in (16, 4096, 7168)] == [16, 1024, 1024]
