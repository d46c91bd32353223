"""A model that ranks share computes what one process computes: in every grid, and whatever form the shares have."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.sharding import shard
from tests.model.cut import GRIDS, cut
from tests.model.references import Reference, named, relative_error
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.checkpoint.sharding.rank_tensors import Sharded, open_ranks
from v4quant.errors import CheckpointError
from v4quant.model.arithmetic import Activations, Arithmetic, Products
from v4quant.model.counted import Counted
from v4quant.model.head import logits
from v4quant.model.rank_worker import Order, RankWorker
from v4quant.model.ranked import RankedModel, virtual_model
from v4quant.model.ranks import Ranks
from v4quant.model.reordered import Reordered
from v4quant.model.router import pick_experts
from v4quant.model.streaming import BlockResult, Model, Pass, StreamedModel, take
from v4quant.model.virtual_ranks import VirtualRanks
from v4quant.model.weights import Matrix

BASE, FLASH = named("tiny-base"), named("tiny-flash")
# Dense parts are whole in every rank of these, so that nothing is added up in another order.
SAME_BITS = ["ep2", "pp2"]
TOKENS, PREFILL = 150, 146
# A BF16 step: a sum in another order moves a number to the next one, here and there.
NOISE = 2.0**-8


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Sharded]:
    @cache
    def make(reference: str, grid: str) -> Sharded:
        out = tmp_path_factory.mktemp("cut")
        if grid == "flat":
            shard(named(reference).folder, out / "flat", 2)
            return open_ranks(out / "flat")
        return cut(named(reference).folder, out / "cut", GRIDS[grid])

    return make


def layers(model: Model, ids: torch.Tensor, inputs: list[torch.Tensor] | None = None) -> list[BlockResult]:
    """Every layer of a prefill and some steps, each fed its input or what the one before gave."""
    schedule = model.schedule([ids], [PREFILL, 1])
    streams, found = model.embed(schedule.input_ids), []
    for index, block in enumerate(model.blocks(0, model.config.num_hidden_layers)):
        (result,) = take(block, [Pass(model.ops, inputs[index] if inputs else streams, schedule)])
        found.append(result)
        streams = result.streams
    return found


def through(model: Model, layer: int, ids: torch.Tensor, streams: torch.Tensor) -> torch.Tensor:
    """What a layer makes of streams [T, S, d]."""
    (block,) = model.blocks(layer, layer + 1)
    (result,) = take(block, [Pass(model.ops, streams, model.schedule([ids]))])
    return result.streams


@cache
def whole(name: str) -> tuple[list[torch.Tensor], list[BlockResult], torch.Tensor]:
    """What goes into every layer in one process, what comes out, and the logits."""
    reference = named(name)
    with torch.inference_mode(), StreamedModel(open_checkpoint(reference.folder)) as model:
        ids = reference.ids[:TOKENS]
        found = layers(model, ids)
        last = found[-1].streams
        return [model.embed(ids), *(own.streams for own in found[:-1])], found, model.head().logits(last)


@pytest.mark.parametrize("grid", ["flat", *GRIDS])
@pytest.mark.parametrize("reference", [BASE, FLASH], ids=lambda own: own.name)
def test_every_layer_and_the_head(reference: Reference, grid: str, cuts: Callable[[str, str], Sharded]) -> None:
    inputs, expected, expected_logits = whole(reference.name)
    ids = reference.ids[:TOKENS]
    with torch.inference_mode(), virtual_model(cuts(reference.name, grid), Arithmetic(), "cpu") as model:
        assert torch.equal(model.embed(ids), inputs[0])
        for one, other in zip(layers(model, ids, inputs), expected, strict=True):
            assert relative_error(one.streams, other.streams) <= (0 if grid in SAME_BITS else NOISE)
            assert torch.equal(one.router_indices, other.router_indices)
            assert (one.indexer_topk is None) == (other.indexer_topk is None)
            if one.indexer_topk is not None and other.indexer_topk is not None:
                assert torch.equal(one.indexer_topk, other.indexer_topk)
        assert torch.equal(logits(model.head(), expected[-1].streams), expected_logits)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_mtp_block(grid: str, cuts: Callable[[str, str], Sharded]) -> None:
    """The last stage embeds tokens of its own."""
    _, found, _ = whole("tiny-base")
    with torch.inference_mode():
        streams, following = found[-1].streams[:40], BASE.ids[1:41]
        outputs = []
        model: StreamedModel | RankedModel
        for model in (
            StreamedModel(open_checkpoint(BASE.folder)),
            virtual_model(cuts("tiny-base", grid), Arithmetic(), "cpu"),
        ):
            with model:
                inner = model.mtp_inputs(0, [(streams, model.ops), (streams, Reordered(model.config))], following)
                schedule = model.schedule([following])
                results = take(model.mtp_block(0), [Pass(model.ops, own, schedule) for own in inner])
                outputs.append((inner, [own.streams for own in results], logits(model.head(0), streams)))
        (inner, streams_of, logits_of), (inner_cut, streams_cut, logits_cut) = outputs
        assert all(torch.equal(one, other) for one, other in zip(inner, inner_cut, strict=True))
        for one, other in zip(streams_cut, streams_of, strict=True):
            assert relative_error(one, other) < NOISE
        assert torch.equal(logits_of, logits_cut)


@pytest.mark.parametrize("fp8_experts", [False, True])
def test_joined_weights_are_the_checkpoints(fp8_experts: bool, tmp_path: Path) -> None:
    """Put together again, shares compute the very bits of the checkpoint, as FP8 and wo_a as BF16 too."""
    shard(FLASH.folder, tmp_path / "flat", 2, fp8_experts=fp8_experts)
    inputs, expected, expected_logits = whole("tiny-flash")
    with torch.inference_mode(), StreamedModel(open_ranks(tmp_path / "flat")) as model:
        for one, other in zip(layers(model, FLASH.ids[:TOKENS], inputs), expected, strict=True):
            assert torch.equal(one.streams, other.streams)
        assert torch.equal(model.head().logits(expected[-1].streams), expected_logits)
        table = model.reader.weights.rows("embed.weight", 200, 300)  # of both ranks
        assert torch.equal(table, model.reader.weights.tensor("embed.weight")[200:300])
        assert model.reader.weights.shape("layers.0.attn.wo_b.weight") == (256, 256)


@pytest.mark.parametrize("grid", ["flat", "tp2 x ep2"])
def test_pieces_of_the_vocabulary_that_a_rank_has_no_row_of(
    grid: str, cuts: Callable[[str, str], Sharded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a real vocabulary, which is read in many pieces."""
    monkeypatch.setattr("v4quant.model.head._PIECE_ROWS", 100)
    _, expected, expected_logits = whole("tiny-flash")
    with torch.inference_mode(), virtual_model(cuts("tiny-flash", grid), Arithmetic(), "cpu") as model:
        assert torch.equal(logits(model.head(), expected[-1].streams), expected_logits)


@pytest.mark.parametrize("grid", ["flat", "tp2 x ep2"])
def test_coded_products(grid: str, cuts: Callable[[str, str], Sharded]) -> None:
    """Products of what is stored; those that ranks add up are decoded, as coded ones come out in BF16."""
    inputs, _, _ = whole("tiny-flash")
    with torch.inference_mode():
        arithmetic = Arithmetic(products=Products.CODED)
        found = []
        model: StreamedModel | RankedModel
        for model in (
            StreamedModel(open_checkpoint(FLASH.folder), arithmetic),
            virtual_model(cuts("tiny-flash", grid), arithmetic, "cpu"),
        ):
            with model:
                found.append(through(model, 2, FLASH.ids[:9], inputs[2][:9]))
        assert relative_error(found[1], found[0]) < NOISE


@pytest.mark.parametrize("activations", list(Activations))
def test_every_arithmetic(activations: Activations, cuts: Callable[[str, str], Sharded]) -> None:
    inputs, _, _ = whole("tiny-base")
    with torch.inference_mode():
        found = []
        model: StreamedModel | RankedModel
        for model in (
            StreamedModel(open_checkpoint(BASE.folder), Arithmetic(activations)),
            virtual_model(cuts("tiny-base", "tp2"), Arithmetic(activations), "cpu"),
        ):
            with model:
                found.append(through(model, 1, BASE.ids[:40], inputs[1][:40].to(model.ops.dtype)))
        assert found[0].dtype == found[1].dtype
        assert relative_error(found[1], found[0]) < (1e-5 if activations is Activations.NONE else NOISE)


def test_each_expert_is_read_once_by_the_rank_that_has_it(cuts: Callable[[str, str], Sharded]) -> None:
    sharded = cuts("tiny-flash", "tp2 x ep2")
    with torch.inference_mode(), virtual_model(sharded, Arithmetic(), "cpu") as model:
        schedule = model.schedule([FLASH.ids[:6]], [4, 1])
        streams = model.embed(schedule.input_ids)
        block, ops = next(model.blocks(0, 1)), model.ops
        (first,) = take(block, [Pass(ops, streams, schedule)])  # reads the dense parts
        before = model.bytes_read
        (again,) = take(block, [Pass(ops, streams, schedule)])
        assert torch.equal(first.streams, again.streams)
        picked = set(first.router_indices.flatten().tolist())
        tensors = open_checkpoint(FLASH.folder).tensors
        expert = sum(own.bytes for name, own in tensors.items() if name.startswith("layers.0.ffn.experts.0."))
        assert model.bytes_read - before == len(picked) * expert


def test_counts_of_all_ranks_are_added_up(cuts: Callable[[str, str], Sharded]) -> None:
    with torch.inference_mode(), virtual_model(cuts("tiny-base", "tp2 x ep2"), Arithmetic(), "cpu") as model:
        ops, schedule = Counted(model.config), model.schedule([BASE.ids[:5]])
        take(next(model.blocks(0, 1)), [Pass(ops, model.embed(schedule.input_ids), schedule)])
        assert ops.take()["attention"] == 4 * 5


@pytest.mark.parametrize("how", [Reordered, Counted])
def test_partial_products_add_up(how: type[Reordered] | type[Counted]) -> None:
    """Both halves of the columns, each in FP32: the whole product to the last bits of FP32, not of BF16."""
    with torch.inference_mode(), StreamedModel(open_checkpoint(FLASH.folder)) as model:
        matrix, ops = model.reader.matrix("layers.0.attn.wo_b"), how(model.config)
        x = torch.randn(7, matrix.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        halves = [
            ops.partial(own.contiguous(), Matrix(weight.contiguous(), None, True))
            for own, weight in zip(x.chunk(2, 1), matrix.weight.chunk(2, 1), strict=True)
        ]
        exact = ops.prepare(x, matrix).double() @ matrix.weight.double().T
        assert relative_error(sum(halves[1:], halves[0]), exact) < 1e-6
        assert torch.equal(
            ops.prepare(x, matrix), torch.cat([ops.prepare(own.contiguous(), matrix) for own in x.chunk(2, 1)], 1)
        )


def test_picks_are_the_first_ranks(cuts: Callable[[str, str], Sharded], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's last bit must not have an expert run twice, or nowhere."""

    def picks(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        indices, weights = pick_experts(*arguments)
        return (indices + 1) % 8 if threading.current_thread().name == "rank 1" else indices, weights

    found = []
    for pick in (pick_experts, picks):
        monkeypatch.setattr("v4quant.model.block.pick_experts", pick)
        with torch.inference_mode(), virtual_model(cuts("tiny-base", "ep2"), Arithmetic(), "cpu") as model:
            found.append(through(model, 1, BASE.ids[:5], whole("tiny-base")[0][1][:5]))
    assert torch.equal(found[0], found[1])


class Adder:
    """A worker that adds up what each rank brings."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def do(self, order: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own = torch.tensor([[order[self._ranks.place.rank]]])
        group = self._ranks.stage
        return group.sum(own), group.join(own, 1), group.agreed(own)

    def close(self) -> None:
        pass


def test_sums_are_taken_in_rank_order() -> None:
    crew = VirtualRanks(Grid(4), Adder)
    try:
        numbers = [1.0, 2.0**24, 1.0, -(2.0**24)]
        for total, joined, agreed in crew.call(numbers):
            assert float(total) == 0.0, "((1 + 2^24) + 1) - 2^24 in FP32"
            assert joined.tolist() == [numbers]
            assert float(agreed) == 1.0
        assert float(crew.call(sorted(numbers))[0][0]) == 2.0
    finally:
        crew.close()


def test_groups_are_those_of_the_grid() -> None:
    class Members(Adder):
        def do(self, order: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            del order
            own = torch.tensor([[float(self._ranks.place.rank)]])
            return self._ranks.tensor.join(own, 1), self._ranks.stage.join(own, 1), own

    crew = VirtualRanks(Grid(2, 2, 2), Members)
    try:
        found = [(tensor.flatten().tolist(), stage.flatten().tolist()) for tensor, stage, _ in crew.call([])]
    finally:
        crew.close()
    assert [tensor for tensor, _ in found] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7]]
    assert [stage for _, stage in found] == [[0, 1, 2, 3]] * 4 + [[4, 5, 6, 7]] * 4


def test_threads_end(cuts: Callable[[str, str], Sharded]) -> None:
    before, cores = threading.active_count(), torch.get_num_threads()
    with torch.inference_mode(), virtual_model(cuts("tiny-base", "tp2 x ep2"), Arithmetic(), "cpu") as model:
        layers(model, BASE.ids[:5])
        assert threading.active_count() >= before + 4
        assert torch.get_num_threads() == cores
    assert threading.active_count() == before
    assert torch.get_num_threads() == cores


def test_a_rank_that_fails_ends_all(cuts: Callable[[str, str], Sharded], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is the one that is raised, whoever waits for it, and nothing hangs."""
    do, before = RankWorker.do, threading.active_count()

    def fails(self: RankWorker, order: Order) -> object:
        if self._place.rank == 2 and order.what == "take":
            raise CheckpointError("rank 2 has had enough")
        return do(self, order)

    monkeypatch.setattr(RankWorker, "do", fails)
    with (
        torch.inference_mode(),
        pytest.raises(CheckpointError, match="rank 2 has had enough"),
        virtual_model(cuts("tiny-base", "tp2 x ep2"), Arithmetic(), "cpu") as model,
    ):
        layers(model, BASE.ids[:5])
    assert threading.active_count() == before


def test_an_error_on_this_side_ends_all(cuts: Callable[[str, str], Sharded]) -> None:
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), virtual_model(cuts("tiny-base", "tp2"), Arithmetic(), "cpu"):
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_a_damaged_share_is_named(tmp_path: Path) -> None:
    shard(BASE.folder, tmp_path / "flat", 2)
    sharded = open_ranks(tmp_path / "flat")
    entry = sharded.ranks[1].tensors["layers.1.attn.attn_sink"]
    with (tmp_path / "flat" / entry.file).open("r+b") as file:
        file.seek(entry.start)
        file.write(b"\xff" * 4)
    with (
        torch.inference_mode(),
        pytest.raises(CheckpointError, match=r"model1-mp2\.safetensors: layers\.1\.attn\.attn_sink: NaN"),
        virtual_model(open_ranks(tmp_path / "flat"), Arithmetic(), "cpu") as model,
    ):
        layers(model, BASE.ids[:5])


def test_models_in_several_threads(cuts: Callable[[str, str], Sharded]) -> None:
    """Two sharded models side by side do not meet each other's ranks."""

    def run(reference: str) -> torch.Tensor:
        with torch.inference_mode(), virtual_model(cuts(reference, "tp2"), Arithmetic(), "cpu") as model:
            return layers(model, named(reference).ids[:20])[-1].streams

    alone = [run(name) for name in ("tiny-base", "tiny-flash")]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, ("tiny-base", "tiny-flash")))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_config_that_is_not_the_checkpoints(tmp_path: Path) -> None:
    shard(BASE.folder, tmp_path / "flat", 2)
    extra = tmp_path / "flat" / "v4quant.extra.safetensors"
    data = extra.read_bytes()
    assert data.count(b'"sliding_window": 32') == 1
    extra.write_bytes(data.replace(b'"sliding_window": 32', b'"sliding_window": 31'))
    with pytest.raises(CheckpointError, match=r"config\.json is not the file that v4quant\.shards\.json tells of"):
        open_ranks(tmp_path / "flat")


@pytest.mark.parametrize("name", ["model1-mp2.safetensors", "v4quant.extra.safetensors"])
def test_a_missing_rank(name: str, tmp_path: Path) -> None:
    shard(BASE.folder, tmp_path / "flat", 2)
    (tmp_path / "flat" / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: is missing"):
        open_ranks(tmp_path / "flat")


def test_ranks_in_another_order(tmp_path: Path) -> None:
    shard(BASE.folder, tmp_path / "flat", 2)
    first, second = (tmp_path / "flat" / f"model{rank}-mp2.safetensors" for rank in (0, 1))
    shutil.move(first, tmp_path / "aside")
    shutil.move(second, first)
    shutil.move(tmp_path / "aside", second)
    with pytest.raises(CheckpointError, match="holds rank 1, expected rank 0"):
        open_ranks(tmp_path / "flat")
