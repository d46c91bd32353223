"""compress_kv: equal to the reference but for FP32 sums and exponentials, states bit for bit; prefill and decode."""

import pytest
import torch

from v4quant.kernels.compress_kv import (
    CompressorState,
    compress_kv,
    compress_kv_torch,
    compressor_append_,
    compressor_append_torch_,
    window_ends,
)
from v4quant.testing.closeness import assert_bf16_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    ("ratio", "dim", "calls"),
    [
        (4, 64, [9, 1, 1, 1, 1, 6]),
        (4, 512, [13, 1]),
        (4, 128, [0, 2]),
        (128, 64, [127, 1, 129]),
        (128, 128, [131]),
    ],
)
def test_equals_the_reference(ratio: int, dim: int, calls: list[int]) -> None:
    """Two sequences side by side, the second one three tokens ahead: its first tokens came in a call of their own."""
    random = torch.Generator().manual_seed(dim)
    width = 2 * dim if ratio == 4 else dim
    ape = torch.randn(ratio, width, generator=random)
    state, expected_state = CompressorState.empty(4, ratio, dim), CompressorState.empty(4, ratio, dim)
    for one in (state, expected_state):  # slots of nobody: reading or writing them shows
        one.kv[[0, 2]] = torch.nan
        one.score[[0, 2]] = torch.nan
    begun = [0, 0]
    for lengths in [(0, 3), *((count, count) for count in calls)]:
        positions = torch.cat([torch.arange(a, a + n, dtype=torch.int32) for a, n in zip(begun, lengths, strict=True)])
        sequences = torch.tensor([3] * lengths[0] + [1] * lengths[1], dtype=torch.int32)
        begun = [a + n for a, n in zip(begun, lengths, strict=True)]
        kv, score = torch.randn(2, sum(lengths), width, generator=random)
        ends = window_ends(positions, ratio)
        where = (sequences, positions)
        found = compress_kv(kv, score, ape, state, *where, ends)
        assert_bf16_close(found, compress_kv_torch(kv, score, ape, expected_state, *where, ends))
        compressor_append_(kv, score, ape, state, *where)
        compressor_append_torch_(kv, score, ape, expected_state, *where)
        torch.testing.assert_close(state.kv, expected_state.kv, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(state.score, expected_state.score, rtol=0, atol=0, equal_nan=True)


def test_scores_far_apart() -> None:
    """One token outweighs all others: its value comes out, and nothing overflows."""
    kv = torch.arange(128.0).repeat(128, 1).T.contiguous()  # token r holds r
    score = torch.full((128, 128), -1e38)
    score[77] = 1e38
    positions = torch.arange(128, dtype=torch.int32)
    state, sequences = CompressorState.empty(1, 128, 128), torch.zeros(128, dtype=torch.int32)
    ends = window_ends(positions, 128)
    found = compress_kv(kv, score, torch.zeros(128, 128), state, sequences, positions, ends)
    assert bool((found == 77).all())
