"""Ranks that hold other bytes than each other where they should hold the same: found in whatever a run reads."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.checkpoint.sharding import shard
from tests.model.cut import GRIDS, cut
from tests.model.references import named
from v4quant.checkpoint.sharding.rank_copies import CopyCheck, Piece
from v4quant.checkpoint.sharding.rank_tensors import open_ranks
from v4quant.errors import CheckpointError
from v4quant.model.arithmetic import Arithmetic
from v4quant.model.head import logits
from v4quant.model.ranked import virtual_model
from v4quant.model.streaming import Pass, take

BASE = named("tiny-base")
# All that a result of the first rank does not show: what others hold of it goes into no sum, or into one of theirs.
COPIES = {
    "flat": [
        *("layers.0.ffn.shared_experts.w2.weight", "layers.1.hc_ffn_fn", "layers.2.hc_attn_base", "hc_head_fn"),
        *("layers.1.ffn.gate.bias", "layers.1.attn.indexer.compressor.ape", "norm.weight"),
        *("mtp.0.enorm.weight", "mtp.0.h_proj.weight", "mtp.0.norm.weight", "mtp.0.ffn.shared_experts.w1.weight"),
    ],
    "ep2": [
        "embed.weight",
        "head.weight",
        "layers.0.attn.wq_b.weight",
        "layers.1.attn.attn_sink",
        "mtp.0.hc_ffn_scale",
    ],
    "tp2 x ep2": ["layers.0.attn.wo_a.weight", "layers.2.attn.wo_b.weight", "layers.1.attn.indexer.wq_b.weight"],
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(grid: str) -> Path:
        out = tmp_path_factory.mktemp("copies") / "ranks"
        if grid == "flat":
            shard(BASE.folder, out, 2)
        else:
            cut(BASE.folder, out, GRIDS[grid])
        return out

    return make


def run(folder: Path) -> None:
    """Everything that a model has, on a few tokens."""
    with torch.inference_mode(), virtual_model(open_ranks(folder), Arithmetic(), "cpu") as model:
        ids = torch.arange(12) * 41 % 500
        schedule = model.schedule([ids])
        streams = model.embed(ids)
        for block in model.blocks(0, model.config.num_hidden_layers):
            streams = take(block, [Pass(model.ops, streams, schedule)])[0].streams
        logits(model.head(), streams)
        (inner,) = model.mtp_inputs(0, [(streams, model.ops)], ids)
        (result,) = take(model.mtp_block(0), [Pass(model.ops, inner, schedule)])
        logits(model.head(0), result.streams)


@pytest.mark.parametrize("grid", COPIES)
def test_like_copies(grid: str, sharded: Callable[[str], Path]) -> None:
    run(sharded(grid))


@pytest.mark.parametrize(("grid", "name"), [(grid, name) for grid, names in COPIES.items() for name in names])
def test_a_copy_that_differs(grid: str, name: str, sharded: Callable[[str], Path], tmp_path: Path) -> None:
    """By one bit, in the last rank."""
    folder = shutil.copytree(sharded(grid), tmp_path / "ranks")
    entry = open_ranks(folder).ranks[-1].tensors[name]
    with (folder / entry.file).open("r+b") as file:
        file.seek(entry.start)
        byte = file.read(1)[0]
        file.seek(entry.start)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match=rf"{name} in \S+ differs from its copy in \S+: ") as caught:
        run(folder)
    assert entry.file in str(caught.value)
    assert caught.value.hint == f"Find all such tensors with: v4quant verify {folder}"


def test_what_is_no_copy() -> None:
    """Another share, other rows."""
    check = CopyCheck("folder")
    check.take({Piece("head.weight", 0, 0, 8): ("a", "1")})
    check.take({Piece("head.weight", 1, 0, 8): ("b", "2"), Piece("head.weight", 0, 8, 16): ("a", "3")})
    check.take({Piece("head.weight", 0, 0, 8): ("c", "1")})
    with pytest.raises(CheckpointError, match=r"folder: head\.weight in d differs from its copy in a"):
        check.take({Piece("head.weight", 0, 0, 8): ("d", "2")})
