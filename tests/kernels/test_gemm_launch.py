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
    assert fp8_gemm_launch(64, 4096, 4096, target, e8m0=False).path == fp8
    assert fp8_gemm_launch(64, 4096, 4096, target, e8m0=True).path == ("scaled" if fp4 == "scaled" else fp8)


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


@pytest.mark.parametrize("e8m0", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_dense_tiles(target: str, e8m0: bool) -> None:
    one_token = fp8_gemm_launch(1, 512, 4096, target, e8m0)
    scaled = one_token.path == "scaled"
    assert (one_token.block_tokens, one_token.block_columns) == (16, 128 if scaled else 64)
    many = fp8_gemm_launch(8192, 65536, 1536, target, e8m0)
    expected = {"sm_80": (128, 128), "sm_90": (256, 64), "sm_100": (256, 64), "gfx942": (128, 128)}
    assert (many.block_tokens, many.block_columns) == ((128, 128) if scaled else expected.get(target, (64, 128)))
    assert many.splits == 1


def test_large_tiles_need_many_tokens_and_tiles() -> None:
    assert fp8_gemm_launch(255, 65536, 1536, "sm_90", e8m0=True).block_tokens == 64
    assert fp8_gemm_launch(1024, 512, 4096, "sm_90", e8m0=True).block_tokens == 64
    assert fp8_gemm_launch(4096, 512, 4096, "sm_90", e8m0=True).block_tokens == 256


@pytest.mark.parametrize(
    ("tokens", "columns", "depth", "splits"),
    [
        (1, 512, 4096, 8),
        (1, 1536, 7168, 4),
        (64, 512, 4096, 8),
        (1, 32768, 1024, 1),
        (1, 512, 256, 1),
        (1, 64, 65536, 128),
    ],
)
def test_few_tiles_split_k(tokens: int, columns: int, depth: int, splits: int) -> None:
    assert fp8_gemm_launch(tokens, columns, depth, "sm_90", e8m0=True).splits == splits
    assert fp8_gemm_launch(tokens, columns, depth, "interpreter", e8m0=True).splits == 1
