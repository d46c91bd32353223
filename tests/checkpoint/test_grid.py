"""Places in a grid: every layer and every expert is somebody's, and all that tells whose says the same."""

import pytest

from v4quant.checkpoint.sharding.grid import Grid
from v4quant.names import parse_name


@pytest.mark.parametrize("stages", range(1, 8))
def test_layers_in_order(stages: int) -> None:
    grid = Grid(2, 3, stages)
    for layers in range(stages, 20):
        of_stage = [list(grid.place(stage * 6).layers(layers)) for stage in range(stages)]
        assert [layer for own in of_stage for layer in own] == list(range(layers))
        sizes = [len(own) for own in of_stage]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
        for stage, own in enumerate(of_stage):
            for layer in own:
                name = parse_name(f"layers.{layer}.attn_norm.weight")
                assert name is not None
                assert grid.stages(name, layers, has_mtp=True) == (stage,)


def test_ranks_in_order() -> None:
    grid = Grid(2, 3, 2)
    coordinates = [(place.stage, place.ep_rank, place.tp_rank) for place in grid.places]
    assert coordinates == [(stage, ep, tp) for stage in range(2) for ep in range(3) for tp in range(2)]
    assert [place.rank for place in grid.places] == list(range(12))
    assert [list(place.stage_ranks()) for place in grid.places] == 6 * [list(range(6))] + 6 * [list(range(6, 12))]


def test_experts_in_order() -> None:
    grid = Grid(2, 3, 2)
    for place in grid.places:
        own = list(place.experts(12))
        assert own == [2 * (place.rank % 6), 2 * (place.rank % 6) + 1]
        assert place.rank in grid.holders((place.stage,), expert_share=own[0] // 2)
        assert place.rank in grid.holders((place.stage,), tp_rank=place.tp_rank)
        assert place.rank not in grid.holders((1 - place.stage,))
