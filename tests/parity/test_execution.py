"""What a run executes against what the config says: equal in every release, unequal whatever is skipped."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.runs import compared
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.config import V4Config
from v4quant.errors import CheckFailedError
from v4quant.kernels.sparse_attention import Picked
from v4quant.model import attention, block, experts
from v4quant.model.arithmetic import Arithmetic, Products
from v4quant.model.cache import PagedStore
from v4quant.model.counted import CLAMPED, Counted
from v4quant.model.mtp import runnable_mtp_blocks
from v4quant.model.streaming import StreamedModel, run_block
from v4quant.parity import execution
from v4quant.parity.execution import Executed, executed_by, require_executed, require_finite, total
from v4quant.parity.prompts import Prompts
from v4quant.testing.releases import synth_config
from v4quant.testing.synth import write_checkpoint

RELEASES = ["flash", "pro", "flash-base", "flash-0731"]
PROMPTS = {"one": [140], "three": [130, 1, 9], "short": [3, 2]}
CHUNKS = {"whole": [], "prefill and steps": [129, 4], "pieces": [7, 60, 3], "one by one": [1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(like: str) -> Path:
        out = tmp_path_factory.mktemp(like) / like
        config_json, scheme = synth_config(like, tiny=True)
        write_checkpoint(out, config_json, scheme, 0)
        return out

    return make


def counted_blocks(
    folder: Path, lengths: list[int], sizes: list[int], layers: range | None = None
) -> list[list[Executed]]:
    """Run blocks, MTP included, on random tokens; what each executed."""
    random = torch.Generator().manual_seed(5)
    found = []
    with torch.inference_mode(), StreamedModel(open_checkpoint(folder), Arithmetic(products=Products.DECODED)) as model:
        ids = [torch.randint(model.config.vocab_size, (length,), generator=random) for length in lengths]
        schedule, ops = model.schedule(ids, sizes), Counted(model.config)
        streams = model.embed(schedule.input_ids)
        layers = layers or range(model.config.num_hidden_layers)
        blocks = [next(model.blocks(layer, layer + 1)) for layer in layers]
        blocks += [model.mtp_block(0)] if runnable_mtp_blocks(model.config) else []
        for own in blocks:
            run_block(own.with_operations(ops), streams, schedule)
            found.append(executed_by(ops.take(), model.config, own.ratio, schedule))
    return found


def differing(blocks: list[list[Executed]]) -> set[str]:
    """Counts that are not as expected."""
    return {item.what for own in blocks for item in own if item.counted != item.expected}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("like", RELEASES)
def test_counts_are_as_expected(like: str, prompts: str, chunks: str, folder: Callable[[str], Path]) -> None:
    lengths, sizes = PROMPTS[prompts], CHUNKS[chunks]
    if chunks == "one by one":
        lengths = [min(length, 9) for length in lengths]
    layers = None if chunks == "whole" else range(2, 4)  # CSA and HCA
    blocks = counted_blocks(folder(like), lengths, sizes, layers)
    assert not differing(blocks)
    for own in blocks:
        counts = {item.what: item.counted for item in own}
        assert counts["tokens that attend"] == sum(lengths)
        assert all(count > 0 for count in counts.values() if max(lengths) >= 128)


def test_expected_counts_by_hand(folder: Callable[[str], Path]) -> None:
    """Nine tokens through the layers of a tiny Flash: window 32, 4 entries a CSA layer's 4 tokens, none of HCA."""
    window, _, csa, hca, *_ = counted_blocks(folder("flash"), [9], [])
    counts = {item.what: item.expected for item in csa}
    assert counts["tokens that attend"] == 9
    assert counts["entries attended to"] == sum(range(1, 10)) + 4 * 1 + 2 * 2
    assert counts["compressed entries, the indexer's included"] == 2 * 2
    assert counts["tokens that the indexer picks for"] == 6
    assert counts["tokens in experts, the shared one included"] == 9 * 5
    assert counts["tokens through hyper-connections"] == 9 * 4
    d, q, width, o = 256, 128, 4 * 128, 128
    attention = d * q + q * width + d * 128 + width * o + 2 * o * d
    experts = 5 * 3 * d * 256
    indexer = q * 8 * 128 + d * 8
    assert counts["multiply-adds of BF16 products"] == 9 * (attention + experts + indexer)
    assert counts["multiply-adds of FP32 products"] == 9 * d * (8 + 4 * 128 + 4 * 128)
    window_counts = {item.what: item.expected for item in window}
    assert window_counts["multiply-adds of BF16 products"] == 9 * (attention + experts)
    assert window_counts["multiply-adds of FP32 products"] == 9 * d * 8
    assert not {what for what in window_counts if "compressed" in what or "indexer" in what}
    hca_counts = {item.what: item.expected for item in hca}
    assert hca_counts["multiply-adds of FP32 products"] == 9 * d * (8 + 2 * 128)
    assert hca_counts["compressed entries, the indexer's included"] == 0


def test_the_window_and_the_choice_limit_what_is_attended_to(folder: Callable[[str], Path]) -> None:
    """140 tokens: of 32 in the window, of 16 picks among up to 35 CSA entries, of one HCA entry from token 127 on."""
    window, _, csa, hca, *_ = counted_blocks(folder("flash"), [140], [])
    attended = [{item.what: item.expected for item in own}["entries attended to"] for own in (window, csa, hca)]
    in_window = sum(min(position + 1, 32) for position in range(140))
    picks = sum(min((position + 1) // 4, 16) for position in range(140))
    assert attended == [in_window, in_window + picks, in_window + 13]


def nothing_routed(asked: Any, _: object) -> list[torch.Tensor]:
    return [own.empty() for own in asked]


def half_of_the_queries(queries: int, device: torch.device) -> list[slice]:
    del device
    return [slice(0, (queries + 1) // 2)]


def half_of_the_entries(own: Callable[..., Picked]) -> Callable[..., Picked]:
    def picked(self: Any, sequences: torch.Tensor, entries: torch.Tensor) -> Picked:
        return own(self, sequences, torch.where(entries % 2 == 0, entries, -1))

    return picked


SKIPPED: dict[str, tuple[Callable[[pytest.MonkeyPatch], object], set[str]]] = {
    "shared expert": (
        lambda patch: patch.setattr(block, "shared_expert", lambda x, *_: torch.zeros_like(x)),
        {"products", "experts"},
    ),
    "routed experts": (lambda patch: patch.setattr(block, "routed_experts", nothing_routed), {"products", "experts"}),
    "down projection": (
        lambda patch: patch.setattr(
            experts,
            "_expert",
            lambda rows, expert: [
                own.ops.swiglu(*(own.ops.multiply(own.prepared, w) for w in (expert.w1, expert.w3)), own.limit)
                for own in rows
            ],
        ),
        {"products"},
    ),
    "compressor": (
        lambda patch: patch.setattr(attention, "compress", lambda *_: None),
        {"compressed entries", "FP32 products"},
    ),
    "indexer": (
        lambda patch: patch.setattr(
            attention, "pick_entries", lambda x, *_: torch.zeros(len(x), 16, dtype=torch.int32)
        ),
        {"indexer", "products", "attended entries"},
    ),
    "half of the queries": (
        lambda patch: patch.setattr(attention, "query_pieces", half_of_the_queries),
        {"attention", "attended entries", "products"},
    ),
    "half of the entries": (
        lambda patch: patch.setattr(
            PagedStore,
            "picked",
            half_of_the_entries(PagedStore.picked),
        ),
        {"attended entries"},
    ),
    "window": (
        lambda patch: patch.setattr(
            attention, "window_entries", lambda positions, _: torch.full((len(positions), 1), -1, dtype=torch.int32)
        ),
        {"attended entries"},
    ),
    "hyper-connections": (
        lambda patch: patch.setattr(
            Counted, "combine", lambda self, f, x, post, comb: super(Counted, self).combine(f, x, post, comb)
        ),
        {"hyper-connections"},
    ),
    "mix of hyper-connections": (
        lambda patch: patch.setattr(Counted, "mix", lambda self, x, w: super(Counted, self).mix(x, w)),
        {"hyper-connections"},
    ),
    "output projection": (
        lambda patch: patch.setattr(
            Counted,
            "grouped_linear",
            lambda _, x, weight: torch.zeros(*x.shape[:2], weight.shape[1], dtype=torch.bfloat16),
        ),
        {"products"},
    ),
    "router": (
        lambda patch: patch.setattr(
            block,
            "pick_experts",
            lambda x, *_: (torch.arange(4).expand(len(x), 4).contiguous(), torch.ones(len(x), 4)),
        ),
        {"FP32 products"},
    ),
    "an expert of each token": (
        lambda patch: patch.setattr(
            block,
            "pick_experts",
            lambda x, *_: (torch.arange(3).expand(len(x), 3).contiguous(), torch.ones(len(x), 3)),
        ),
        {"experts", "products", "FP32 products"},
    ),
}


@pytest.mark.parametrize("module", SKIPPED)
def test_what_is_skipped_is_seen(module: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a CSA layer of a tiny Flash, which has everything."""
    skip, units = SKIPPED[module]
    skip(monkeypatch)
    found = counted_blocks(folder("flash"), [80], [], range(2, 3))[:1]
    assert differing(found) == {execution._UNITS[unit] for unit in units}
    with pytest.raises(CheckFailedError, match=r"layer 2: .* ran, expected .*: parts of the reference did not run"):
        require_executed(found[0], "layer 2")


def test_everything_that_ran_is_accepted(folder: Callable[[str], Path]) -> None:
    for own in counted_blocks(folder("flash"), [80], [], range(2, 3)):
        require_executed(own, "layer 2")


@pytest.mark.parametrize("counted", [0, 99, 101])
def test_one_count_that_is_off(counted: int) -> None:
    good = Executed("tokens that attend", 100, 100)
    with pytest.raises(CheckFailedError, match=rf"layer 3: entries: {counted} ran, expected 100"):
        require_executed([good, Executed("entries", counted, 100)], "layer 3")


def test_a_comparison_refuses_a_reference_that_did_not_run(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides run the same code; what neither of them runs makes no difference."""
    path = folder("flash")
    prompts = Prompts.of([torch.arange(20)], None, open_checkpoint(path).config, "test")
    monkeypatch.setattr(block, "shared_expert", lambda x, *_: torch.zeros_like(x))
    with pytest.raises(CheckFailedError, match=r"layer 0: (multiply-adds of BF16 products|tokens in experts)"):
        compared(path, path, prompts)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_reference_that_computes_no_numbers(number: float) -> None:
    streams = torch.zeros(9, 4, 8, dtype=torch.bfloat16)
    require_finite(streams, "layer 3")
    streams[2, 1, 3] = streams[2, 3, 1] = streams[7, 0, 0] = number
    with pytest.raises(CheckFailedError, match="layer 3: what the reference makes of 2 of 9 tokens is NaN or infinite"):
        require_finite(streams, "layer 3")


def test_totals() -> None:
    blocks = [[Executed("a", 1, 2), Executed("b", 3, 3)], [Executed("b", 4, 5), Executed("c", 0, 1)]]
    assert total(blocks) == [Executed("a", 1, 2), Executed("b", 7, 8), Executed("c", 0, 1)]


def test_counting_changes_no_bit_and_starts_anew(folder: Callable[[str], Path]) -> None:
    with torch.inference_mode(), StreamedModel(open_checkpoint(folder("pro")), Arithmetic()) as model:
        schedule, ops = model.schedule([torch.arange(20)]), Counted(model.config)
        own, streams = next(model.blocks(2, 3)), model.embed(torch.arange(20))
        counted, plain = (run_block(own.with_operations(how), streams, schedule) for how in (ops, model.ops))
        assert torch.equal(counted.streams, plain.streams)
        assert ops.take()["attention"] == 20
        assert not ops.take()


def test_clamped_values() -> None:
    """Of gates those above the limit, of ups those beyond it on either side."""
    ops = Counted(V4Config.from_json(synth_config("flash", tiny=True)[0], "flash"))
    gate = torch.tensor([[11.0, -11.0, 10.0, 0.0]]).to(torch.bfloat16)
    up = torch.tensor([[11.0, -11.0, -10.0, 0.0]]).to(torch.bfloat16)
    ops.swiglu(gate, up, 10.0)
    assert ops.take() == {CLAMPED: 3, "experts": 1}
