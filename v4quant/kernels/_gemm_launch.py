"""How the quantised matrix products are cut into tiles: pure functions of shapes and target.

All of them compute transposed tiles, weights x tokens: the rows of a matrix instruction are weight rows, 64 or 128 of
them however few tokens there are, and weights go from registers, where they are decoded, straight into it.
"""

from dataclasses import dataclass

from v4quant.kernels._target import capability, has_block_scaled_mma, has_fp8_mma

SCALE_BLOCK = 128  # columns that share an activation scale, and rows and columns that share an FP8 weight scale


@dataclass(frozen=True)
class GemmLaunch:
    """A tile and the way it is multiplied.

    Attributes:
        path: "upcast": FP4 weights and E4M3 activations decoded to BF16 with their scales; "scaled": codes left as they
            are, tl.dot_scaled; "fp8": E4M3 matrix instruction, scales applied every 128 of K; "fp16": the same sums
            where there is none, E4M3 decoded to FP16 by integer operations.
        block_tokens: tokens of a tile.
        block_columns: weight rows of a tile, which are columns of the output.
        block_k: K of a step.
        splits: programs that share the K of a tile; their sums are added in order afterwards.
    """

    path: str
    block_tokens: int
    block_columns: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


# Tiles of a GPU that keep it busy: about one for each multiprocessor (108 on A100, 132 on H100, 148 on B200).
_BUSY = 128
# Tokens, columns and warps of the largest tile whose two accumulators, the sum and the 128 columns at hand, spill
# nothing; elsewhere it is that of 64 tokens and 128 columns.
_LARGE_TILES = {"sm_80": (128, 128, 8), "sm_90": (256, 64, 8), "sm_100": (256, 64, 8), "gfx942": (128, 128, 4)}


def fp8_gemm_launch(tokens: int, columns: int, depth: int, target: str, e8m0: bool) -> GemmLaunch:
    """Tiles of fp8_gemm.

    Args:
        tokens: M.
        columns: N.
        depth: K.
        target: as target_of names it.
        e8m0: whether weight scales are powers of two; else float32, which no matrix instruction applies.
    """
    block_tokens, block_columns = min(_power_of_two(tokens, least=16), 64), 128
    num_warps = 8
    if e8m0 and has_block_scaled_mma(target):
        path, block_tokens = "scaled", min(_power_of_two(tokens, least=16), 128)
    else:
        path = "fp8" if has_fp8_mma(target) else "fp16"
        large = _LARGE_TILES.get(target)
        if large and _tiles(tokens, columns, *large[:2]) >= _BUSY and tokens >= large[0]:
            block_tokens, block_columns, num_warps = large
        elif _tiles(tokens, columns, block_tokens, block_columns) < _BUSY:
            block_columns, num_warps = 64, 4
    tiles = _tiles(tokens, columns, block_tokens, block_columns)
    splits = 1 if target == "interpreter" else _splits(tiles, depth // SCALE_BLOCK)
    stages = _stages(target, block_tokens)
    return GemmLaunch(path, block_tokens, block_columns, SCALE_BLOCK, num_warps, stages, splits)


def _tiles(tokens: int, columns: int, block_tokens: int, block_columns: int) -> int:
    return -(-columns // block_columns) * -(-tokens // block_tokens)


def _splits(tiles: int, steps: int) -> int:
    """A power of two that makes a GPU busy with few tiles, and leaves four steps along K to each program."""
    splits = 1
    while 2 * splits * tiles <= _BUSY and steps >= 8 * splits:
        splits *= 2
    return splits


def expert_launch(rows: int, experts: int, target: str, fp4: bool) -> GemmLaunch:
    """Tiles of both products of fp4_expert_gemm. A tile has 128 columns, so that it can quantise what it computes.

    Args:
        rows: token-expert pairs.
        experts: experts that they may fall on.
        target: as target_of names it.
        fp4: whether weights are FP4; else FP8.
    """
    # The tile follows the mean: smaller ones decode weights again and again, larger ones multiply padding.
    block_tokens = min(_power_of_two(-(-rows // experts), least=16), 128)
    # Registers set the upper limits; offline compilation shows where they spill.
    amd = target.startswith("gfx")
    if not fp4:
        path, most = ("fp8", 64) if has_fp8_mma(target) else ("fp16", 64 if amd else 32)
        block_tokens = min(block_tokens, most)
        block_k = SCALE_BLOCK
    elif has_block_scaled_mma(target):
        path, block_k = "scaled", 128
    else:
        hopper = capability(target) == 90
        path, block_tokens = "upcast", min(block_tokens, 128 if hopper else 64)
        block_k = 128 if block_tokens <= (64 if hopper else 16) else 64
    # Four wavefronts of 64 lanes are as many threads as eight warps, with twice the registers.
    num_warps = 4 if amd and block_tokens > 16 else 8
    return GemmLaunch(path, block_tokens, 128, block_k, num_warps, _stages(target, block_tokens))


def _stages(target: str, block_tokens: int) -> int:
    """Loads in flight, as many as shared memory holds: sm_86 and sm_120 have 99 KiB of it, gfx942 64."""
    if capability(target) == 0:
        return 2
    return 4 if capability(target) in (90, 100, 103) and block_tokens <= 64 else 3


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << max(size - 1, 0).bit_length())
