"""Several runs side by side through a block: each gets the very bits of a run alone, and each expert is read once."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.checkpoint.conversion import convert
from tests.model.references import Reference, named
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.model.arithmetic import Activations, Arithmetic, Products
from v4quant.model.block import Block
from v4quant.model.counted import Counted
from v4quant.model.release import Release
from v4quant.model.reordered import Reordered
from v4quant.model.streaming import BlockResult, Lane, StreamedModel, run_block, run_lanes
from v4quant.testing.asserts import assert_bitwise_equal

FLASH = named("tiny-flash")
TOKENS = {Products.DECODED: 70, Products.CODED: 8}  # coded products are slow on a CPU
CSA = 2


class Doubled(Release):
    """Operations that nobody could take for the release's."""

    def plain_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return 2 * super().plain_linear(x, weight)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
        return 3 * super().swiglu(gate, up, limit)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each stored form."""
    folder = tmp_path_factory.mktemp("forms")
    for form in ("fp8", "bf16"):
        convert(FLASH.folder, folder / form, form)
    return {"native": FLASH.folder, "fp8": folder / "fp8", "bf16": folder / "bf16", "base": named("tiny-base").folder}


def assert_same_bits(found: BlockResult, expected: BlockResult) -> None:
    assert_bitwise_equal(found.streams.view(torch.int16).numpy(), expected.streams.view(torch.int16).numpy())
    assert torch.equal(found.router_indices, expected.router_indices)
    assert torch.equal(found.router_weights.view(torch.int32), expected.router_weights.view(torch.int32))
    assert (found.indexer_topk is None) == (expected.indexer_topk is None)
    if found.indexer_topk is not None and expected.indexer_topk is not None:
        assert torch.equal(found.indexer_topk, expected.indexer_topk)


def lanes_of(model: StreamedModel, block: Block, reference: Reference) -> list[Lane]:
    """Different operations, chunks, streams, tokens and numbers of prompts; some share a part."""
    count = TOKENS[model.reader.arithmetic.products]
    ids, other = reference.ids[:count], reference.ids.flip(0)[: count // 2]
    whole, pieces = model.schedule([ids]), model.schedule([ids], [count // 2, 1, count])
    two = model.schedule([other[:3], other[3:]], [9, 3])
    streams, noisy = model.embed(ids), model.embed(ids)
    noisy += torch.randn(noisy.shape, generator=torch.Generator().manual_seed(3)).to(noisy.dtype)
    reordered, counted = (block.with_operations(ops) for ops in (Reordered(model.config), Counted(model.config)))
    return [
        Lane(block, streams, whole),
        Lane(reordered, streams, whole),
        Lane(block, streams, pieces),
        Lane(block, noisy, whole),
        Lane(counted, model.embed(two.input_ids), two),
        Lane(reordered, noisy[:3], model.schedule([ids[:3]])),
        Lane(block.with_operations(Doubled(model.config)), streams, whole),
    ]


def alone(lanes: Sequence[Lane]) -> list[BlockResult]:
    return [run_block(lane.block, lane.streams, lane.schedule) for lane in lanes]


EVERY = [
    ("native", Products.DECODED, 0),
    ("native", Products.CODED, CSA),
    *((form, Products.DECODED, CSA) for form in ("native", "fp8", "bf16", "base")),
    ("base", Products.CODED, 1),
]


@pytest.mark.parametrize(("form", "products", "layer"), EVERY)
def test_each_lane_has_the_bits_of_a_run_alone(
    form: str, products: Products, layer: int, forms: dict[str, Path]
) -> None:
    reference = named("tiny-base" if form == "base" else "tiny-flash")
    checkpoint = open_checkpoint(forms[form])
    layer = min(layer, checkpoint.config.num_hidden_layers - 1)
    with torch.inference_mode(), StreamedModel(checkpoint, Arithmetic(products=products)) as model:
        lanes = lanes_of(model, next(model.blocks(layer, layer + 1)), reference)
        together, expected = run_lanes(lanes), alone(lanes)
        for found, own in zip(together, expected, strict=True):
            assert_same_bits(found, own)
        backwards = run_lanes(lanes[:2:-1])[::-1]
        for found, own in zip(backwards, expected[3:], strict=True):
            assert_same_bits(found, own)
    assert not torch.equal(expected[0].streams, expected[1].streams), "other operations are other bits"
    assert not torch.equal(expected[0].streams, expected[3].streams)


def test_lanes_with_other_weights_and_activations(forms: dict[str, Path]) -> None:
    """Blocks that differ outside of their experts, and a run whose activations are not rounded before BF16."""
    arithmetic = Arithmetic(Activations.STORED)
    with (
        torch.inference_mode(),
        StreamedModel(open_checkpoint(forms["bf16"]), arithmetic) as model,
        StreamedModel(open_checkpoint(forms["native"]), Arithmetic()) as other,
    ):
        block, theirs = next(model.blocks(1, 2)), next(other.blocks(1, 2))
        schedule = model.schedule([FLASH.ids[:20]])
        streams = model.embed(schedule.input_ids)
        lanes = [
            Lane(block, streams, schedule),
            Lane(block.with_weights(theirs.weights, block.experts), streams, schedule),
        ]
        together, expected = run_lanes(lanes), alone(lanes)
        for found, own in zip(together, expected, strict=True):
            assert_same_bits(found, own)
        assert not torch.equal(together[0].streams, together[1].streams)


@pytest.mark.parametrize("products", list(Products))
def test_each_expert_is_read_once_for_all_lanes(products: Products) -> None:
    checkpoint = open_checkpoint(FLASH.folder)
    with torch.inference_mode(), StreamedModel(checkpoint, Arithmetic(products=products)) as model:
        block = next(model.blocks(CSA, CSA + 1))
        schedules = [model.schedule([FLASH.ids[first : first + 2]], [1]) for first in (0, 40, 0)]
        lanes = [Lane(block, model.embed(schedule.input_ids), schedule) for schedule in schedules]
        before = model.reader.weights.bytes_read
        results = run_lanes(lanes)
        read = model.reader.weights.bytes_read - before
        picked = [set(result.router_indices.flatten().tolist()) for result in results]
        assert picked[0] != picked[1], "the lanes ask for different experts"
        sizes = {
            expert: sum(
                entry.bytes
                for name, entry in checkpoint.tensors.items()
                if name.startswith(f"layers.{CSA}.ffn.experts.{expert}.")
            )
            for expert in range(checkpoint.config.n_routed_experts)
        }
        assert len(set.union(*picked)) < len(sizes)
        assert read == sum(sizes[expert] for expert in set.union(*picked))


def test_the_streams_that_go_in_stay_as_they_are() -> None:
    with torch.inference_mode(), StreamedModel(open_checkpoint(FLASH.folder)) as model:
        lanes = lanes_of(model, next(model.blocks(0, 1)), FLASH)
        before = [lane.streams.clone() for lane in lanes]
        run_lanes(lanes)
        assert all(torch.equal(lane.streams, own) for lane, own in zip(lanes, before, strict=True))
