"""Sharded and merged again, every file of a checkpoint is what it was; and which numbers of ranks are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.conversion import REFERENCES, convert, edit, rewrite, write_small
from tests.checkpoint.sharding import merge, shard, write_wide
from tests.checkpoint.sparse import write_sparse
from v4quant.checkpoint import plan
from v4quant.checkpoint.reader import Checkpoint, open_checkpoint
from v4quant.checkpoint.sharding import shard as shard_module
from v4quant.checkpoint.sharding import stream
from v4quant.checkpoint.sharding.folder import open_sharded
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.checkpoint.sharding.merge import MergePlan
from v4quant.checkpoint.sharding.rules import Layout, obstacles, working_shares
from v4quant.checkpoint.sharding.shard import plan_shard
from v4quant.errors import CheckFailedError, CheckpointError, UsageError
from v4quant.testing.asserts import assert_same_checkpoint
from v4quant.testing.releases import Like, synth_config
from v4quant.testing.synth import write_checkpoint

ALL = [1, 2, 4, 8]


def working_ranks(source: Checkpoint) -> list[int]:
    """Numbers of ranks that work in DeepSeek's layout."""
    return working_shares(source, Grid(1), Layout.DEEPSEEK)


def assert_comes_back(source: Path, tmp_path: Path, ranks: int, *, fp8_experts: bool = False) -> None:
    """Shard, merge, compare."""
    shard(source, tmp_path / f"mp{ranks}", ranks, fp8_experts=fp8_experts)
    merge(tmp_path / f"mp{ranks}", tmp_path / f"back{ranks}")
    assert_same_checkpoint(tmp_path / f"back{ranks}", source)


@pytest.fixture(scope="module", params=[*Like])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("wide") / request.param, request.param)


@pytest.mark.parametrize("ranks", ALL)
def test_every_file_comes_back(wide: Path, ranks: int, tmp_path: Path) -> None:
    assert_comes_back(wide, tmp_path, ranks)


@pytest.mark.parametrize("ranks", [1, 4])
def test_every_file_comes_back_from_fp8_experts(wide: Path, ranks: int, tmp_path: Path) -> None:
    assert_comes_back(wide, tmp_path, ranks, fp8_experts=True)


@pytest.mark.parametrize("like", [*Like])
def test_tiny_releases(like: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", *synth_config(like, tiny=True))
    assert working_ranks(open_checkpoint(tmp_path / "source")) == [1, 2]
    for ranks in (1, 2):
        assert_comes_back(tmp_path / "source", tmp_path, ranks)


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda path: path.name)
def test_reference_checkpoints(reference: Path, tmp_path: Path) -> None:
    """The checkpoints that DeepSeek's own arithmetic was run on, without its outputs, which are no part of them."""
    source = shutil.copytree(reference, tmp_path / "source", ignore=shutil.ignore_patterns("reference.safetensors"))
    working = working_ranks(open_checkpoint(source))
    assert working == [1, 2]
    for ranks in working:
        assert_comes_back(source, tmp_path, ranks)


@pytest.mark.parametrize("to", ["fp8", "base", "bf16"])
def test_converted_checkpoints_keep_their_certificate(to: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    convert(write_wide(tmp_path / "native"), source, to)
    assert (source / "v4quant.certificate.jsonl").exists()
    assert_comes_back(source, tmp_path, 4)


@pytest.mark.parametrize("chunk", [1, 1000, 4097])
@pytest.mark.parametrize("fp8_experts", [False, True])
def test_pieces_of_any_size(chunk: int, fp8_experts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that end within a share of rows, single rows of columns, bands of 128 rows."""
    source = write_small(tmp_path / "source", mtp=True) if chunk == 1 else write_wide(tmp_path / "source")
    shard(source, tmp_path / "whole", 2, fp8_experts=fp8_experts)
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk if chunk > 1 else 300)
    monkeypatch.setattr(shard_module, "CHUNK_BYTES", 7)
    shard(source, tmp_path / "pieces", 2, fp8_experts=fp8_experts)
    assert_same_checkpoint(tmp_path / "pieces", tmp_path / "whole")
    merge(tmp_path / "pieces", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", source)


@pytest.mark.parametrize("workers", [1, 7])
def test_the_same_whatever_the_workers(workers: int, tmp_path: Path) -> None:
    source = write_wide(tmp_path / "source")
    shard(source, tmp_path / "two", 4)
    shard(source, tmp_path / "other", 4, workers=workers)
    assert_same_checkpoint(tmp_path / "other", tmp_path / "two")
    merge(tmp_path / "other", tmp_path / "back", workers=workers)
    assert_same_checkpoint(tmp_path / "back", source)


def test_a_copy_of_the_checkpoint_gives_the_same_files(tmp_path: Path) -> None:
    """Neither times nor paths stand in what is written."""
    source = write_wide(tmp_path / "source")
    shutil.copytree(source, tmp_path / "elsewhere" / "copy")
    shard(source, tmp_path / "one", 2)
    shard(tmp_path / "elsewhere" / "copy", tmp_path / "two", 2)
    assert_same_checkpoint(tmp_path / "two", tmp_path / "one")


def reorder(path: Path) -> None:
    """Rewrite a weight file in another style: metadata, spaces, data in the opposite order, odd padding."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", "note": "é"}}
    body = b""
    for name, entry in reversed(header.items()):
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        fields[name] = {"shape": entry["shape"], "data_offsets": [len(body), len(body) + stop - start]}
        fields[name]["dtype"] = entry["dtype"]
        body += data[start:stop]
    text = json.dumps(fields, indent=1, ensure_ascii=False).encode() + b"     "
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("fp8_experts", [False, True])
def test_files_of_another_writer(fp8_experts: bool, tmp_path: Path) -> None:
    """Whatever order and header style the files have, they come back so."""
    source = write_wide(tmp_path / "source")
    for path in source.glob("*.safetensors"):
        reorder(path)
    assert not open_checkpoint(source).problems
    assert_comes_back(source, tmp_path, 2, fp8_experts=fp8_experts)


def test_weight_and_scale_in_different_files(tmp_path: Path) -> None:
    source = write_wide(tmp_path / "source")
    names = sorted(path.name for path in source.glob("*.safetensors"))
    index = json.loads((source / "model.safetensors.index.json").read_text())
    moved: dict[str, Any] = {}

    def take(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith(("wo_a.scale", "experts.5.w1.scale"))]:
            moved[name] = tensors.pop(name)

    rewrite(source / names[1], take)
    rewrite(source / names[0], lambda tensors: tensors.update(moved))
    index["weight_map"] |= dict.fromkeys(moved, names[0])
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(moved) == 2
    assert_comes_back(source, tmp_path, 8, fp8_experts=True)


def test_nan_patterns_infinities_and_negative_zeros_pass(tmp_path: Path) -> None:
    """Bytes are bytes where nothing is recoded."""
    source = write_wide(tmp_path / "source")
    for name in ("layers.1.attn.wq_b.weight", "layers.1.attn.wo_b.scale", "embed.weight", "layers.0.attn.attn_sink"):
        edit(source, name, lambda data: data.fill(0xFF))
    edit(source, "layers.0.ffn.experts.3.w2.weight", lambda data: data.fill(0x88))
    assert_comes_back(source, tmp_path, 8)


@pytest.mark.parametrize("fp8_experts", [False, True])
def test_blocks_of_zeros_keep_their_scales(fp8_experts: bool, tmp_path: Path) -> None:
    """No value tells the scale of a zero: it must be kept. So must the sign of each."""
    source = write_wide(tmp_path / "source")
    for name in ("layers.0.ffn.experts.3.w1.weight", "layers.0.attn.wo_a.weight"):
        edit(source, name, lambda data: data.__setitem__((slice(0, 128), slice(0, 64)), 0))
        edit(source, name, lambda data: data.__setitem__((slice(0, 128), slice(64, 128)), 0x80))
    edit(source, "layers.0.attn.wo_a.scale", lambda data: data.__setitem__((0, 0), 99))
    edit(source, "layers.0.ffn.experts.3.w1.scale", lambda data: data.__setitem__((slice(0, 128), slice(0, 2)), 80))
    assert_comes_back(source, tmp_path, 2, fp8_experts=fp8_experts)


def test_scales_that_no_quantiser_would_have_chosen(tmp_path: Path) -> None:
    """Groups whose largest value is far below what their scale allows: their codes follow from the scale alone."""
    source = write_wide(tmp_path / "source")
    for name in ("layers.0.ffn.experts.4.w1", "mtp.0.ffn.experts.7.w2"):
        edit(source, f"{name}.scale", lambda data: data.fill(121))
        edit(source, f"{name}.weight", lambda data: data.__setitem__((slice(None), slice(16, 32)), 0x91))  # 0.5, -0.5
    assert_comes_back(source, tmp_path, 2, fp8_experts=True)


def test_experts_that_fp8_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = write_wide(tmp_path / "source")
    name = "layers.1.ffn.experts.2.w1"
    edit(source, f"{name}.weight", lambda data: data.fill(0x11))
    edit(source, f"{name}.scale", lambda data: data.fill(127))
    edit(source, f"{name}.scale", lambda data: data.__setitem__((3, slice(None)), 127 - 30))
    with pytest.raises(CheckFailedError, match=rf"{name}.weight: 256 values would change as fp8"):
        shard(source, tmp_path / "out", 2, fp8_experts=True)
    assert not list((tmp_path / "out").glob("*mp2.safetensors"))
    assert_comes_back(source, tmp_path, 2)


def test_wo_a_that_bf16_cannot_hold_is_counted_and_comes_back(tmp_path: Path) -> None:
    source = write_wide(tmp_path / "source", "flash-base")
    edit(source, "layers.1.attn.wo_a.scale", lambda data: data.__setitem__((0, 0), 0x55))
    assert shard(source, tmp_path / "out", 4).rounded == 1
    merge(tmp_path / "out", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", source)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("layers.0.attn.wo_a.weight", 0x7F, r"layers\.0\.attn\.wo_a\.weight\[200, 9\] is NaN"),
        ("layers.0.attn.wo_a.scale", 0xFF, r"layers\.0\.attn\.wo_a\.scale\[3, 0\] is NaN"),
        ("layers.0.ffn.experts.1.w1.scale", 0xFF, r"layers\.0\.ffn\.experts\.1\.w1\.scale\[200, 4\] is NaN"),
    ],
)
def test_what_is_recoded_must_be_finite(
    name: str, value: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)  # so that coordinates count from the tensor's first row, not the band's
    place = {"wo_a.weight": (200, 9), "wo_a.scale": (3, 0), "w1.scale": (200, 4)}[".".join(name.split(".")[-2:])]
    source = write_wide(tmp_path / "source")
    edit(source, name, lambda data: data.__setitem__(place, value))
    with pytest.raises(CheckpointError, match=says):
        shard(source, tmp_path / "out", 2, fp8_experts=True)


FLASH_WORKS, PRO_WORKS = [1, 2, 4, 8], [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("like", "works"),
    [(like, FLASH_WORKS if like.startswith("flash") else PRO_WORKS) for like in Like],
)
def test_the_ranks_that_work_for_the_releases(like: str, works: list[int], tmp_path: Path) -> None:
    """Full size: output groups are the fewest of what is shared out."""
    source = open_checkpoint(write_sparse(tmp_path / "source", like, layers=3, experts=None))
    assert working_ranks(source) == works
    found = [str(obstacle) for obstacle in obstacles(source, Grid(32), Layout.DEEPSEEK)]
    assert f"layers.0.attn.wo_a.weight: {works[-1]} output groups do not divide by 32" in found


def obstacles_of(tmp_path: Path, ranks: int, **changes: int) -> dict[str, str]:
    config_json, scheme = synth_config("flash", tiny=True, layers=3)
    wide = {"num_attention_heads": 8, "o_groups": 8, "o_lora_rank": 128, "n_routed_experts": 8, "index_n_heads": 8}
    write_checkpoint(tmp_path / "source", config_json | wide | changes, scheme)
    return {o.tensor: o.reason for o in obstacles(open_checkpoint(tmp_path / "source"), Grid(ranks), Layout.DEEPSEEK)}


EXPERT = "layers.0.ffn.experts.0.w1.weight"
INDEXER = "layers.2.attn.indexer"


@pytest.mark.parametrize(
    ("changes", "tensor", "reason"),
    [
        ({}, "", ""),
        ({"vocab_size": 514}, "embed.weight", "514 tokens of the vocabulary do not divide by 4"),
        ({"n_routed_experts": 6}, EXPERT, "6 routed experts do not divide by 4"),
        ({"index_n_heads": 2}, f"{INDEXER}.weights_proj.weight", "2 indexer heads do not divide by 4"),
        ({"index_n_heads": 2}, f"{INDEXER}.wq_b.weight", "2 indexer heads do not divide by 4"),
        ({"o_groups": 2, "o_lora_rank": 512}, "layers.0.attn.wo_b.weight", "2 output groups do not divide by 4"),
        ({"num_attention_heads": 4, "head_dim": 256}, "", ""),
        ({"num_attention_heads": 2, "head_dim": 512}, "layers.0.attn.attn_sink", "2 attention heads do not divide"),
        (
            {"index_head_dim": 32},
            f"{INDEXER}.wq_b.weight",
            "a rank's 64 of 256 rows are no whole number of scale blocks of 128x128",
        ),
        (
            {"o_lora_rank": 96},
            "layers.0.attn.wo_b.weight",
            "a rank's 192 of 768 columns are no whole number of scale blocks of 128x128",
        ),
        # 320 rows have three scale blocks of 128, the last cut: no share of them is whole.
        (
            {"head_dim": 80, "num_attention_heads": 4, "o_groups": 4},
            "layers.0.attn.wq_b.weight",
            "a rank's 80 of 320 rows are no whole number of scale blocks of 128x128",
        ),
    ],
)
def test_what_forbids_four_ranks(changes: dict[str, int], tensor: str, reason: str, tmp_path: Path) -> None:
    found = obstacles_of(tmp_path, 4, **changes)
    if not tensor:
        assert not found
    else:
        assert found[tensor].startswith(reason), found


def test_edge_blocks_do_no_harm_to_one_rank(tmp_path: Path) -> None:
    assert not obstacles_of(tmp_path, 1, o_lora_rank=96, index_head_dim=32)
    assert_comes_back(tmp_path / "source", tmp_path, 1)


def test_bf16_has_no_blocks_to_cut(tmp_path: Path) -> None:
    obstacles_of(tmp_path, 4, index_head_dim=32)
    convert(tmp_path / "source", tmp_path / "bf16", "bf16")
    assert 4 in working_ranks(open_checkpoint(tmp_path / "bf16"))
    assert_comes_back(tmp_path / "bf16", tmp_path, 4)


def test_refusals_name_the_tensor_and_what_works(tmp_path: Path) -> None:
    source = open_checkpoint(write_wide(tmp_path / "source"))
    with pytest.raises(UsageError, match=r"--tp 16 does not work: layers\.0\.attn\.attn_sink: 8 attention") as caught:
        plan_shard(source, Grid(16))
    assert "These work, up to 64: 1, 2, 4, 8." in caught.value.hint


def test_bf16_experts_do_not_become_fp8(tmp_path: Path) -> None:
    convert(write_wide(tmp_path / "native", layers=1), tmp_path / "bf16", "bf16")
    with pytest.raises(UsageError, match="--experts fp8 is for FP4 experts, found BF16"):
        plan_shard(open_checkpoint(tmp_path / "bf16"), Grid(2), fp8_experts=True)


def test_counts(tmp_path: Path) -> None:
    """What is promised is what lies on the disk."""
    source = open_checkpoint(write_wide(tmp_path / "source"))
    found = plan_shard(source, Grid(4))
    shard(tmp_path / "source", tmp_path / "out", 4)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert on_disk <= found.disk_bytes <= on_disk + 20_000
    back = MergePlan(open_sharded(tmp_path / "out"))
    assert (back.tensors, back.bytes_written) == (found.tensors, source.bytes)
    assert back.disk_bytes == sum(path.stat().st_size for path in (tmp_path / "source").rglob("*") if path.is_file())
