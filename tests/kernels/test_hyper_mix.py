"""hyper_mix, the torch references: against float64 written out, by-hand cases, what Sinkhorn promises, the refusals."""

from typing import Any

import numpy as np
import pytest
import torch

from v4quant.kernels.hyper_mix import hyper_collapse, hyper_combine, hyper_mix
from v4quant.testing.closeness import assert_bf16_close

EPS: Any = {"norm_eps": 1e-6, "eps": 1e-6}


def inputs(tokens: int, streams: int, dims: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(dims)
    rows = 2 * streams + streams**2
    return {
        "x": torch.randn(tokens, streams, dims, generator=random).to(torch.bfloat16),
        "fn": torch.randn(rows, streams * dims, generator=random) * (streams * dims) ** -0.5,
        "scale": torch.tensor([0.7, 1.1, 1.9]),
        "base": torch.randn(rows, generator=random),
    }


def float64_mix(given: dict[str, Any], iterations: int) -> tuple[Any, Any, Any]:
    x, fn, scale, base = (given[name].double().numpy() for name in ("x", "fn", "scale", "base"))
    streams = x.shape[1]
    flat = x.reshape(len(x), -1)
    mix = flat @ fn.T / np.sqrt((flat**2).mean(1, keepdims=True) + 1e-6)
    pre = 1 / (1 + np.exp(-(mix[:, :streams] * scale[0] + base[:streams]))) + 1e-6
    post = 2 / (1 + np.exp(-(mix[:, streams : 2 * streams] * scale[1] + base[streams : 2 * streams])))
    comb = np.exp(mix[:, 2 * streams :] * scale[2] + base[2 * streams :]).reshape(-1, streams, streams)
    comb = comb / comb.sum(2, keepdims=True) + 1e-6
    for round_number in range(iterations):
        if round_number:
            comb = comb / (comb.sum(2, keepdims=True) + 1e-6)
        comb = comb / (comb.sum(1, keepdims=True) + 1e-6)
    return np.einsum("tj,tjd->td", pre, x), post, comb


@pytest.mark.parametrize(("tokens", "streams", "dims", "iterations"), [(130, 4, 256, 20), (3, 2, 16, 1), (5, 8, 48, 3)])
def test_mix_agrees_with_float64(tokens: int, streams: int, dims: int, iterations: int) -> None:
    given = inputs(tokens, streams, dims)
    y, post, comb = hyper_mix(**given, **EPS, iterations=iterations)
    expected, expected_post, expected_comb = float64_mix(given, iterations)
    np.testing.assert_allclose(post.numpy(), expected_post, rtol=5e-6)
    np.testing.assert_allclose(comb.numpy(), expected_comb, rtol=2e-5)
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=2.0**-8, atol=1e-5)


def test_sinkhorn_makes_rows_and_columns_sum_to_one() -> None:
    _, _, comb = hyper_mix(**inputs(20, 4, 64), **EPS, iterations=20)
    np.testing.assert_allclose(comb.sum(1).numpy(), 1, atol=3e-6)
    np.testing.assert_allclose(comb.sum(2).numpy(), 1, atol=1e-2)


def test_combine_sums_the_first_index_of_comb() -> None:
    x = torch.tensor([[[1.0] * 16, [10.0] * 16]], dtype=torch.bfloat16)
    f = torch.full((1, 16), 100.0, dtype=torch.bfloat16)
    comb = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])  # comb[j, k]: from stream j to stream k
    found = hyper_combine(f, x, torch.tensor([[0.5, 0.25]]), comb)
    assert found[0, :, 0].tolist() == [50 + 2 * 10, 25 + 1 + 3 * 10]


def test_combine_agrees_with_float64() -> None:
    given = inputs(70, 4, 48)
    random = torch.Generator().manual_seed(1)
    f = torch.randn(70, 48, generator=random).to(torch.bfloat16)
    post, comb = torch.rand(70, 4, generator=random), torch.rand(70, 4, 4, generator=random)
    expected = post[:, :, None].double() * f[:, None].double()
    expected += torch.einsum("tjk,tjd->tkd", comb.double(), given["x"].double())
    found = hyper_combine(f, given["x"], post, comb)
    torch.testing.assert_close(found.double(), expected, rtol=2.0**-8, atol=1e-6)


def test_collapse_agrees_with_the_pre_of_mix() -> None:
    """Same rows, scale and base: the same gate."""
    given = inputs(9, 4, 64)
    y, _, _ = hyper_mix(**given, **EPS, iterations=2)
    rows = given["fn"][:4].contiguous()
    collapsed = hyper_collapse(given["x"], rows, given["scale"][:1].contiguous(), given["base"][:4].contiguous(), **EPS)
    assert_bf16_close(collapsed, y)


def test_no_tokens() -> None:
    y, post, comb = hyper_mix(**inputs(0, 4, 16), **EPS, iterations=20)
    assert (y.shape, post.shape, comb.shape) == ((0, 16), (0, 4), (0, 4, 4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4, 32)}, TypeError, "x is torch.float32"),
        ({"x": torch.zeros(2, 32).bfloat16()}, ValueError, r"x has shape \[2, 32\]"),
        ({"x": torch.zeros(2, 3, 32).bfloat16()}, ValueError, "x has 3 streams of 32 dims"),
        ({"x": torch.zeros(2, 4, 24).bfloat16()}, ValueError, "x has 4 streams of 24 dims"),
        ({"fn": torch.zeros(24, 64)}, ValueError, r"fn has shape \[24, 64\], expected \[24, 128\]"),
        ({"scale": torch.zeros(1)}, ValueError, r"scale has shape \[1\], expected \[3\]"),
        ({"base": torch.zeros(24).double()}, TypeError, "base is torch.float64"),
        ({"iterations": 0}, ValueError, "iterations is 0"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {**inputs(2, 4, 32), **EPS, "iterations": 20, **change}
    with pytest.raises(error, match=message):
        hyper_mix(**arguments)


def test_combine_and_collapse_refuse_shapes() -> None:
    x = torch.zeros(2, 4, 32).bfloat16()
    with pytest.raises(ValueError, match=r"f has shape \[2, 16\], expected \[2, 32\]"):
        hyper_combine(x[:, 0, :16].contiguous(), x, torch.zeros(2, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"fn has shape \[24, 128\], expected \[4, 128\]"):
        hyper_collapse(x, torch.zeros(24, 128), torch.zeros(1), torch.zeros(4), **EPS)
