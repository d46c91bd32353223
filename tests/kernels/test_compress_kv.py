"""compress_kv, the torch reference: against float64 token by token, every way of cutting a prompt, refusals."""

from typing import Any

import numpy as np
import pytest
import torch

from v4quant.kernels.compress_kv import CompressorState, compress_kv, compressor_append_, window_ends
from v4quant.testing.closeness import assert_bf16_close


def tokens(count: int, ratio: int, dim: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(count)
    width = 2 * dim if ratio == 4 else dim
    return {
        "kv": torch.randn(count, width, generator=random),
        "score": torch.randn(count, width, generator=random) * 3,
        "ape": torch.randn(ratio, width, generator=random),
    }


def by_definition(kv: torch.Tensor, score: torch.Tensor, ape: torch.Tensor) -> torch.Tensor:
    """Entries of a whole sequence in float64."""
    value, z, bias = (x.double().numpy() for x in (kv, score, ape))
    ratio = len(bias)
    dim = value.shape[1] // (2 if ratio == 4 else 1)
    entries = []
    for last in range(ratio - 1, len(value), ratio):
        rows = range(last - ratio + 1, last + 1)
        terms = [(z[r, -dim:] + bias[r % ratio, -dim:], value[r, -dim:]) for r in rows]
        if ratio == 4:
            older = [r for r in range(last - 7, last - 3) if r >= 0]
            terms += [(z[r, :dim] + bias[r % 4, :dim], value[r, :dim]) for r in older]
        weight = np.exp([score - max(other[0].max() for other in terms) for score, _ in terms])
        entries.append((weight * [value for _, value in terms]).sum(0) / weight.sum(0))
    return torch.from_numpy(np.array(entries).reshape(-1, dim)).to(torch.bfloat16)


def in_pieces(given: dict[str, torch.Tensor], cuts: list[int], state: CompressorState, sequence: int) -> torch.Tensor:
    """Entries of one sequence whose tokens come in calls."""
    found = []
    for start, stop in zip([0, *cuts], [*cuts, len(given["kv"])], strict=True):
        positions = torch.arange(start, stop, dtype=torch.int32)
        call = {"kv": given["kv"][start:stop], "score": given["score"][start:stop], "ape": given["ape"]}
        call |= {"sequences": torch.full_like(positions, sequence), "positions": positions}
        found.append(compress_kv(**call, state=state, ends=window_ends(positions, len(given["ape"]))))
        compressor_append_(**call, state=state)
    return torch.cat(found)


@pytest.mark.parametrize(("count", "ratio"), [(0, 4), (3, 4), (4, 4), (29, 4), (127, 128), (128, 128), (300, 128)])
def test_prefill_agrees_with_float64(count: int, ratio: int) -> None:
    given = tokens(count, ratio, 64)
    found = in_pieces(given, [], CompressorState.empty(1, ratio, 64), 0)
    assert_bf16_close(found, by_definition(**given))


@pytest.mark.parametrize(
    ("count", "ratio", "cuts"),
    [
        (29, 4, list(range(1, 29))),  # decode from the first token on
        (29, 4, [13, 14, 15, 16, 17]),  # prefill, then decode
        (29, 4, [3, 4, 11, 27]),
        (300, 128, [1, 127, 129, 257, 258]),
        (300, 128, [128, 256]),
    ],
)
def test_a_prompt_cut_anywhere_gives_the_same_bits(count: int, ratio: int, cuts: list[int]) -> None:
    given = tokens(count, ratio, 64)
    whole, cut = CompressorState.empty(1, ratio, 64), CompressorState.empty(2, ratio, 64)
    assert torch.equal(in_pieces(given, cuts, cut, 1), in_pieces(given, [], whole, 0))
    assert torch.equal(cut.kv[1], whole.kv[0])
    assert torch.equal(cut.score[1], whole.score[0])
    untouched = CompressorState.empty(1, ratio, 64)
    assert torch.equal(cut.score[0], untouched.score[0])


def test_sequences_in_one_call_do_not_mix() -> None:
    """A prefill of one and a decode step of another, at the end of its window, in one call."""
    first, second = tokens(9, 4, 64), tokens(8, 4, 64)
    second["ape"] = first["ape"]
    state = CompressorState.empty(3, 4, 64)
    in_pieces({**second, "kv": second["kv"][:7], "score": second["score"][:7]}, [5], state, 2)
    positions = torch.tensor([*range(9), 7], dtype=torch.int32)
    found = compress_kv(
        kv=torch.cat([first["kv"], second["kv"][7:]]),
        score=torch.cat([first["score"], second["score"][7:]]),
        ape=first["ape"],
        state=state,
        sequences=torch.tensor([0] * 9 + [2], dtype=torch.int32),
        positions=positions,
        ends=window_ends(positions, 4),
    )
    assert_bf16_close(found, torch.cat([by_definition(**first), by_definition(**second)[1:]]))


def test_a_state_begun_anew_forgets() -> None:
    given = tokens(12, 4, 64)
    state = CompressorState.empty(1, 4, 64)
    expected = in_pieces(given, [5], state, 0)
    state.reset_(0)
    assert torch.equal(in_pieces(given, [6], state, 0), expected)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"kv": torch.zeros(3, 128).bfloat16()}, TypeError, "kv is torch.bfloat16"),
        ({"score": torch.zeros(3, 64)}, ValueError, r"score has shape \[3, 64\]"),
        ({"ape": torch.zeros(8, 128)}, ValueError, r"ape has shape \[8, 128\], expected 4 rows of 2 D or 128 of D"),
        ({"state": CompressorState.empty(1, 128, 128)}, ValueError, r"state.kv has shape \[1, 128, 128\]"),
        ({"positions": torch.arange(3)}, TypeError, "positions is torch.int64"),
        ({"sequences": torch.zeros(2, dtype=torch.int32)}, ValueError, r"sequences has shape \[2\]"),
    ],
)
def test_refusals(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    none = torch.zeros(3, dtype=torch.int32)
    given = {**tokens(3, 4, 64), "state": CompressorState.empty(1, 4, 64), "sequences": none, "positions": none}
    with pytest.raises(error, match=message):
        compress_kv(**{**given, **changed}, ends=torch.zeros(0, dtype=torch.int32))
    with pytest.raises(error, match=message):
        compressor_append_(**{**given, **changed})
