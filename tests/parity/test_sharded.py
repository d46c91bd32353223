"""Parity of a sharded checkpoint: like the whole one, and unlike it whatever went wrong in the sharding."""

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.sharding import shard
from tests.model.cut import GRIDS, cut
from tests.model.references import named
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.checkpoint.sharding.compare_shares import share_differences
from v4quant.checkpoint.sharding.rank_tensors import Sharded, open_ranks
from v4quant.model import block
from v4quant.model.experts import routed_experts
from v4quant.parity.attribution import blame
from v4quant.parity.compare import Comparison, Task, compare
from v4quant.parity.prompts import Prompts, built_prompts
from v4quant.parity.result import to_json
from v4quant.parity.stored import StoredOutputs
from v4quant.parity.verdict import NOT_EXECUTED, Verdict, blocks_of

BASE, FLASH = named("tiny-base"), named("tiny-flash")


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-base, sharded for two ranks."""
    folder = tmp_path_factory.mktemp("flat") / "mp2"
    shard(BASE.folder, folder, 2)
    return folder


def compared(sharded: Sharded, reference: Path = BASE.folder, length: int = 80, **options: Any) -> Comparison:
    whole = open_checkpoint(reference)
    return compare(Task(sharded, whole, built_prompts(whole.config, length, None), **options))


def exchanged(flat: Path, out: Path, pairs: Iterable[tuple[str, str]]) -> Sharded:
    """A copy in which tensors of the first rank and tensors of the second have changed places.

    Args:
        pairs: a tensor of rank 0, and one of rank 1 of the same size.
    """
    shutil.copytree(flat, out)
    for names in pairs:
        sharded = open_ranks(out)
        entries = [rank.tensors[name] for rank, name in zip(sharded.ranks, names, strict=True)]
        data = [
            rank.files.read(own.file, own.start, own.stop) for rank, own in zip(sharded.ranks, entries, strict=True)
        ]
        assert data[0] != data[1]
        for entry, other in zip(entries, data[::-1], strict=True):
            with (out / entry.file).open("r+b") as file:
                file.seek(entry.start)
                file.write(other)
    return open_ranks(out)


@pytest.mark.parametrize("fp8_experts", [False, True])
def test_deepseeks_layout(fp8_experts: bool, tmp_path: Path) -> None:
    shard(FLASH.folder, tmp_path / "mp2", 2, fp8_experts=fp8_experts)
    found = compared(open_ranks(tmp_path / "mp2"), FLASH.folder, 140)
    assert found.judgement.verdict is not Verdict.DIFFERENT
    assert not found.attribution
    assert all(item.counted == item.expected for own in found.outcome.layers for item in own.executed)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products on one core: ranks share the cores, and sums on another number of them take another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid(grid: str, tmp_path: Path) -> None:
    """Within the floor; where dense parts are whole, bit by bit. What ran is what all ranks together had to run."""
    found = compared(cut(BASE.folder, tmp_path / "cut", GRIDS[grid]))
    within = {Verdict.IDENTICAL} if GRIDS[grid].tp == 1 else {Verdict.IDENTICAL, Verdict.INDISTINGUISHABLE}
    assert found.judgement.verdict in within
    assert found.outcome.mtp is not None
    for own in blocks_of(found.outcome):
        assert all(item.counted == item.expected for item in own.executed)
    attends = next(item for item in found.outcome.layers[0].executed if item.what == "tokens that attend")
    assert attends.counted == 80 * GRIDS[grid].expert_shares


def test_what_is_said_of_it(flat: Path) -> None:
    whole, sharded = open_checkpoint(BASE.folder), open_ranks(flat)
    task = Task(sharded, whole, built_prompts(whole.config, 30, None))
    result = to_json(task, compare(task), [])
    told = result["evidence"]["candidate"]
    assert told["ranks"] == {"how": "virtual", "ranks": 2, "tp": 2, "ep": 1, "pp": 1}
    assert result["evidence"]["reference"]["ranks"] is None
    for key in ("release", "format", "config_sha256", "index_sha256"):
        assert told[key] == result["evidence"]["reference"][key]
    assert told["bytes"] == sharded.bytes == sum(result["bytes_by_role"]["candidate"].values())
    assert told["bytes"] > result["evidence"]["reference"]["bytes"], "what all ranks hold is there twice"
    json.dumps(result)


def test_two_ranks_experts_exchanged(flat: Path, tmp_path: Path) -> None:
    names = [f"layers.1.ffn.experts.{{}}.{part}" for part in ("w1.weight", "w2.weight", "w3.weight")]
    sharded = exchanged(flat, tmp_path / "copy", [(name.format(2), name.format(6)) for name in names])
    found = compared(sharded)
    assert found.judgement.verdict is Verdict.DIFFERENT
    assert blame(found.outcome, found.judgement, found.attribution).module == "experts"
    tensors = {mismatch.tensor: mismatch.reason for own in found.attribution for mismatch in own.tensors}
    assert set(tensors) == {name.format(expert) for name in names for expert in (2, 6)}
    assert tensors["layers.1.ffn.experts.2.w1.weight"].endswith("(rank 0)")
    assert tensors["layers.1.ffn.experts.6.w1.weight"].endswith("(rank 1)")


WRONG: dict[str, tuple[list[str], int | None, str | None]] = {
    "heads of the queries": (["layers.1.attn.wq_b.weight"], 1, "attention projections"),
    "groups": (["layers.0.attn.wo_a.weight"], 0, "attention projections"),
    "columns of wo_b": (["layers.2.attn.wo_b.weight"], 2, "attention projections"),
    "weights of indexer heads": (["layers.1.attn.indexer.weights_proj.weight"], 1, "indexer"),
    "embedding": (["embed.weight"], None, "embedding"),
    "head": (["head.weight"], None, "head"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_share_in_the_wrong_rank(what: str, flat: Path, tmp_path: Path) -> None:
    names, layer, module = WRONG[what]
    found = compared(exchanged(flat, tmp_path / "copy", [(name, name) for name in names]))
    assert found.judgement.verdict is Verdict.DIFFERENT
    who = blame(found.outcome, found.judgement, found.attribution)
    assert (who.layer, who.module) == (layer, module)


def test_a_wrong_share_of_sinks(flat: Path, tmp_path: Path) -> None:
    """Sinks of miniatures weigh little: of all layers, where they are made to matter."""
    shutil.copytree(flat, tmp_path / "strong")
    for rank in open_ranks(tmp_path / "strong").ranks:
        entry = rank.tensors["layers.0.attn.attn_sink"]
        with (tmp_path / "strong" / entry.file).open("r+b") as file:
            file.seek(entry.start)
            file.write(torch.tensor([4.0, 1.0] if rank.place.rank == 0 else [-2.0, 0.0]).numpy().tobytes())
    whole = shutil.copytree(BASE.folder, tmp_path / "whole")
    entry = open_checkpoint(whole).tensors["layers.0.attn.attn_sink"]
    path = whole / entry.file
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(entry.start)
        file.write(torch.tensor([4.0, 1.0, -2.0, 0.0]).numpy().tobytes())
    assert compared(open_ranks(tmp_path / "strong"), whole).judgement.verdict is not Verdict.DIFFERENT
    wrong = exchanged(tmp_path / "strong", tmp_path / "copy", [("layers.0.attn.attn_sink", "layers.0.attn.attn_sink")])
    found = compared(wrong, whole)
    assert found.judgement.verdict is Verdict.DIFFERENT
    assert blame(found.outcome, found.judgement, found.attribution).module == "attention projections"


def only_in(rank: str, skipped: Callable[..., Any], usual: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is another one in one rank."""

    def either(*arguments: Any) -> Any:
        return (skipped if threading.current_thread().name == rank else usual)(*arguments)

    return either


def test_a_module_that_one_rank_does_not_run(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its experts, of which other ranks know nothing."""
    skipped = only_in("rank 1", lambda asked, _: [own.empty() for own in asked], routed_experts)
    monkeypatch.setattr(block, "routed_experts", skipped)
    found = compared(open_ranks(flat), length=30)
    assert found.judgement.verdict is Verdict.DIFFERENT
    assert any(departure.figure.startswith(NOT_EXECUTED) for departure in found.judgement.departures)


def test_stored_outputs(flat: Path) -> None:
    sharded = open_ranks(flat)
    stored = StoredOutputs(BASE.outputs, sharded.config)
    prompts = Prompts.of([stored.input_ids], stored.prefill, sharded.config, "stored")
    found = compare(Task(sharded, stored, prompts))
    assert found.judgement.verdict is Verdict.INDISTINGUISHABLE


def test_differences_of_values(flat: Path, tmp_path: Path) -> None:
    """Of every tensor but those that ranks do without; wo_a is compared though it is BF16 in ranks."""
    whole = open_checkpoint(BASE.folder)
    assert not list(share_differences(open_ranks(flat), whole, ""))
    wrong = exchanged(flat, tmp_path / "copy", [("layers.0.attn.wo_a.weight", "layers.0.attn.wo_a.weight")])
    (found,) = share_differences(wrong, whole, "")
    assert found.tensor == "layers.0.attn.wo_a.weight"
    assert "values differ, first at [0, " in found.reason
    assert found.reason.endswith("(ranks 0, 1)")
    assert not list(share_differences(wrong, whole, "layers.1."))
