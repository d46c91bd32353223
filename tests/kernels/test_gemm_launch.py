"""Tiles of the matrix products: what each target multiplies with, and how tiles follow the number of tokens."""

import pytest

from v4quant.kernels._gemm_launch import expert_launch, fp8_gemm_launch

TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "interpreter"]


@pytest.mark.parametrize(
    ("target", "fp4", "fp8"),
    [
        ("sm_80", "upcast", "fp16"),
        ("sm_89", "upcast", "fp8"),
        ("sm_90", "upcast", "fp8"),
        ("sm_100", "scaled", "fp8"),
        ("sm_103", "scaled", "fp8"),
        ("sm_120", "upcast", "fp8"),
        ("gfx942", "upcast", "fp16"),
        ("interpreter", "upcast", "fp16"),
    ],
)
def test_path(target: str, fp4: str, fp8: str) -> None:
    assert expert_launch(12288, 256, target, fp4=True).path == fp4
    assert expert_launch(12288, 256, target, fp4=False).path == fp8
    assert fp8_gemm_launch(64, 4096, target).path == fp8


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fp4", [True, False])
def test_expert_tiles(target: str, fp4: bool) -> None:
    previous = 0
    for rows in (1, 6, 256, 4096, 5000, 12288, 49152, 10**6):
        choice = expert_launch(rows, 256, target, fp4)
        assert choice.block_tokens in (16, 32, 64, 128)
        assert choice.block_tokens >= previous
        assert choice.block_columns == 128, "a tile quantises 128 columns"
        assert choice.block_k in ((64, 128) if choice.path == "upcast" else (128,))
        previous = choice.block_tokens


@pytest.mark.parametrize(("rows", "block"), [(6, 16), (16 * 256, 16), (17 * 256, 32), (33 * 256, 64), (65 * 256, 128)])
def test_the_tile_follows_the_mean(rows: int, block: int) -> None:
    assert expert_launch(rows, 256, "sm_90", fp4=True).block_tokens == block


@pytest.mark.parametrize(("rows", "warps"), [(6, 8), (12288, 4), (49152, 4)])
def test_wavefronts_are_twice_as_wide_as_warps(rows: int, warps: int) -> None:
    assert expert_launch(rows, 256, "gfx942", fp4=True).num_warps == warps
    assert expert_launch(rows, 256, "sm_90", fp4=True).num_warps == 8


@pytest.mark.parametrize("target", TARGETS)
def test_dense_tiles(target: str) -> None:
    one_token = fp8_gemm_launch(1, 512, target)
    assert (one_token.block_tokens, one_token.block_columns) == (16, 64)
    many = fp8_gemm_launch(8192, 65536, target)
    assert (many.block_tokens, many.block_columns) == (64, 128)
