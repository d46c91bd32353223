"""Folders of ranks: every element where the rules say, back byte for byte, and from any split into any other."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.checkpoint.conversion import REFERENCES, convert, stored_torch
from tests.checkpoint.sharding import merge, shard, split, write_wide
from tests.checkpoint.test_shard_layout import AXES, BLOCK, EXPERT, read, same
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.checkpoint.sharding.folder import open_sharded
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.checkpoint.sharding.rules import Layout, working_shares
from v4quant.checkpoint.sharding.shard import plan_shard
from v4quant.checkpoint.verify import verify_hashes
from v4quant.cli.main import main
from v4quant.errors import CheckpointError, UsageError
from v4quant.testing.asserts import assert_same_checkpoint
from v4quant.testing.releases import Like

LAYERS = 3
GRIDS = [Grid(2), Grid(1, 2), Grid(2, 2), Grid(1, 1, 2), Grid(2, 2, 3), Grid(4, 2, 1)]
# Beside what DeepSeek's ranks share out, those of the MTP blocks' own vocabulary, and wo_a with its scale.
MORE_AXES = [(rf"{BLOCK}\.attn\.wo_a\.scale", 0), (r"mtp\.0\.(emb\.tok_emb|head)\.weight", 0)]


@pytest.fixture(scope="module", params=[*Like])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("ranks") / request.param, request.param, layers=LAYERS)


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("ranks") / "flash")


def layers_of(stage: int, stages: int) -> list[int]:
    """3 layers in 1, 2 and 3 stages, written out."""
    return {1: [[0, 1, 2]], 2: [[0, 1], [2]], 3: [[0], [1], [2]]}[stages][stage]


def stages_of(name: str, grid: Grid) -> list[int]:
    """Where a tensor lies, by the rules as docs/formats.md has them."""
    if match := re.match(r"layers\.(\d+)\.", name):
        return [stage for stage in range(grid.pp) if int(match[1]) in layers_of(stage, grid.pp)]
    return sorted({0, grid.pp - 1}) if name == "embed.weight" else [grid.pp - 1]


def held(rank: int, grid: Grid, source: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """What a rank must hold, and the first row or column of what is cut."""
    tp, ep, stage = rank % grid.tp, rank // grid.tp % grid.ep, rank // (grid.tp * grid.ep)
    found: dict[str, torch.Tensor] = {}
    starts: dict[str, int] = {}
    for name, tensor in source.items():
        if stage not in stages_of(name, grid):
            continue
        if match := re.fullmatch(EXPERT, name):
            each = 8 // (grid.tp * grid.ep)
            if int(match[2]) // each == ep * grid.tp + tp:
                found[name] = tensor
            continue
        axis = next((axis for pattern, axis in AXES + MORE_AXES if re.fullmatch(pattern, name)), None)
        if axis is not None and grid.tp > 1:
            size = tensor.shape[axis] // grid.tp
            view = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
            tensor = view.narrow(axis, tp * size, size).contiguous().view(tensor.dtype)
            starts[name] = tp * size
        found[name] = tensor
    return found, starts


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_element_is_where_the_rules_say(source: Path, grid: Grid, tmp_path: Path) -> None:
    split(source, tmp_path / "out", grid, max_shard_bytes=600_000)
    whole = stored_torch(source)
    for rank in range(grid.ranks):
        folder = tmp_path / "out" / f"rank-{rank:03d}"
        found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in read(path).items()}
        expected, starts = held(rank, grid, whole)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert same(found[name], tensor), name
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert all(name in read(folder / index[name]) for name in found) and index.keys() == found.keys()
        assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()
        record = json.loads((folder / "v4quant.shards.json").read_text())
        assert record["rank"] == rank
        stage, each = rank // (grid.tp * grid.ep), 8 // (grid.tp * grid.ep)
        layers, has_mtp = layers_of(stage, grid.pp), any(name.startswith("mtp.") for name in expected)
        assert record["layers"] == [layers[0], layers[-1] + 1]
        assert bool(record["mtp_blocks"]) == has_mtp == (stage == grid.pp - 1)
        first = (rank // grid.tp % grid.ep * grid.tp + rank % grid.tp) * each
        assert record["experts"] == [first, first + each]
        assert record["cut"].keys() == starts.keys()
        for name, cut in record["cut"].items():
            axis = next(axis for pattern, axis in AXES + MORE_AXES if re.fullmatch(pattern, name))
            assert cut["axis"] == axis
            assert cut["start"] == starts[name]
            assert cut["stop"] - cut["start"] == expected[name].shape[axis]
            assert cut["of"] == list(whole[name].shape)


def without_certificate(folder: Path) -> Path:
    (folder / "v4quant.certificate.jsonl").unlink()
    return folder


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_file_comes_back_with_a_certificate(source: Path, grid: Grid, tmp_path: Path) -> None:
    split(source, tmp_path / "ranks", grid)
    merge(tmp_path / "ranks", tmp_path / "back")
    back = open_checkpoint(tmp_path / "back")
    report = verify_hashes(back)
    assert report.ok
    assert sum(report.verdicts.values()) == len(back.tensors)
    assert_same_checkpoint(without_certificate(tmp_path / "back"), source)


def test_a_certificate_of_its_own_comes_back(flash: Path, tmp_path: Path) -> None:
    convert(flash, tmp_path / "fp8", "fp8")
    split(tmp_path / "fp8", tmp_path / "ranks", Grid(2, 2))
    merge(tmp_path / "ranks", tmp_path / "back")
    assert_same_checkpoint(tmp_path / "back", tmp_path / "fp8")


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda path: path.name)
def test_reference_checkpoints(reference: Path, tmp_path: Path) -> None:
    source = shutil.copytree(reference, tmp_path / "source", ignore=shutil.ignore_patterns("reference.safetensors"))
    for number, grid in enumerate((Grid(2), Grid(1, 2), Grid(2, 2))):
        if grid.tp in working_shares(open_checkpoint(source), grid, Layout.RANKS):
            split(source, tmp_path / f"ranks{number}", grid)
            merge(tmp_path / f"ranks{number}", tmp_path / f"back{number}")
            assert_same_checkpoint(without_certificate(tmp_path / f"back{number}"), source)


def test_any_split_into_any_other(source: Path, tmp_path: Path) -> None:
    """DeepSeek's files of two and four ranks, the latter with FP8 experts where they are FP4, and two grids."""
    is_fp4 = "base" not in source.name
    shard(source, tmp_path / "mp2", 2)
    shard(source, tmp_path / "mp4", 4, fp8_experts=is_fp4)
    split(source, tmp_path / "a", Grid(2, 2))
    split(source, tmp_path / "b", Grid(1, 4, 2))
    for name in ("mp2", "mp4", "a", "b"):
        other = tmp_path / f"from-{name}"
        shard(tmp_path / name, other / "mp2", 2)
        split(tmp_path / name, other / "a", Grid(2, 2), workers=3)
        assert_same_checkpoint(other / "mp2", tmp_path / "mp2")
        assert_same_checkpoint(other / "a", tmp_path / "a")


def test_what_reads_checkpoints_reads_sharded_ones(flash: Path, tmp_path: Path) -> None:
    shard(flash, tmp_path / "mp4", 4, fp8_experts=True)
    split(flash, tmp_path / "ranks", Grid(2, 2, 2))
    convert(flash, tmp_path / "expected", "bf16")
    whole = open_checkpoint(flash)
    for name in ("mp4", "ranks"):
        found = open_checkpoint(tmp_path / name)
        assert found.tensors.keys() == whole.tensors.keys()
        assert found.source_id() == whole.source_id()
        for entry in whole.tensors.values():  # in ranges that no piece ends at
            for start, stop in ((entry.start, entry.stop), (entry.start + 1, entry.start + 1 + entry.bytes // 3)):
                assert found.files.read(entry.file, start, stop) == whole.files.read(entry.file, start, stop), entry
        for file in whole.files.names():
            assert found.files.read(file) == whole.files.read(file), file
        convert(tmp_path / name, tmp_path / f"{name}-bf16", "bf16")
        assert_same_checkpoint(tmp_path / f"{name}-bf16", tmp_path / "expected")


def test_files_of_a_rank_keep_to_the_limit(flash: Path, tmp_path: Path) -> None:
    split(flash, tmp_path / "ranks", Grid(1, 2), max_shard_bytes=300_000)
    sizes = [path.stat().st_size for path in (tmp_path / "ranks").rglob("model-*.safetensors")]
    assert len(sizes) > 20
    assert sorted(sizes)[-5] < 310_000  # a weight that is larger alone has a file of its own


@pytest.mark.parametrize("pack", ["full", "one"])
def test_packed_otherwise(pack: str, flash: Path, tmp_path: Path) -> None:
    options = ["--tp", "1", "--ep", "2", "--pack", pack, "--max-shard-size", "1MB"]
    assert main(["shard", str(flash), str(tmp_path / "ranks"), *options]) == 0
    files = sorted((tmp_path / "ranks" / "rank-000").glob("*.safetensors"))
    if pack == "one":
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        assert all(700_000 < file.stat().st_size < 1_100_000 for file in files[1:-1])
    merge(tmp_path / "ranks", tmp_path / "back")
    assert_same_checkpoint(without_certificate(tmp_path / "back"), flash)


def test_grids_that_do_not_work(flash: Path, tmp_path: Path) -> None:
    source = open_checkpoint(flash)
    for grid, said in (
        (Grid(3), r"--tp 3 --ep 1 --pp 1 does not work: embed.weight: 512 tokens of the vocabulary do not divide by 3"),
        (Grid(2, 8), r"layers.0.ffn.experts.0.w1.weight: 8 routed experts do not divide by 16"),
        (Grid(1, 1, 4), r"embed.weight: 3 layers do not fill 4 stages"),
    ):
        with pytest.raises(UsageError, match=said) as refusal:
            plan_shard(source, grid, Layout.RANKS)
        assert "--explain" in str(refusal.value.hint)
    # In rank folders wo_a keeps its scale blocks, so what cuts one is refused; as BF16, in DeepSeek's files, it is not.
    narrow = write_wide(tmp_path / "narrow", o_lora_rank=64)
    assert 4 in working_shares(open_checkpoint(narrow), Grid(1), Layout.RANKS)
    assert 8 not in working_shares(open_checkpoint(narrow), Grid(1), Layout.RANKS)
    # One share cuts nothing, so a last block that is no whole one does no harm.
    edges = write_wide(tmp_path / "edges", o_lora_rank=24)
    assert working_shares(open_checkpoint(edges), Grid(1), Layout.RANKS) == [1]


@pytest.mark.parametrize(
    "options",
    [["--tp", "2", "--ep", "2", "--experts", "fp8"], ["--tp", "1024", "--ep", "2"], ["--tp", "2", "--pack", "one"]],
)
def test_options_that_exclude_each_other(options: list[str], flash: Path, tmp_path: Path) -> None:
    assert main(["shard", str(flash), str(tmp_path / "out"), *options]) == 2
    assert not (tmp_path / "out").exists()


def test_the_folder_of_a_rank_is_no_checkpoint(flash: Path, tmp_path: Path) -> None:
    split(flash, tmp_path / "ranks", Grid(1, 2))
    with pytest.raises(CheckpointError, match="is the folder of one rank, expected the folder that holds all"):
        open_checkpoint(tmp_path / "ranks" / "rank-001")


def test_overwriting_leaves_no_ranks_behind(flash: Path, tmp_path: Path) -> None:
    split(flash, tmp_path / "out", Grid(2, 2))
    assert main(["shard", str(flash), str(tmp_path / "out"), "--tp", "1", "--ep", "2", "--overwrite"]) == 0
    split(flash, tmp_path / "fresh", Grid(1, 2), max_shard_bytes=5 * 10**9)
    assert_same_checkpoint(tmp_path / "out", tmp_path / "fresh")


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [("rank-002/model-00003-of-00006.safetensors", 1, "with sha256"), ("v4quant.extra.safetensors", 3, "kept header")],
)
def test_a_damaged_split_is_not_passed_on(
    name: str, code: int, said: str, flash: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into another split as little as into a checkpoint: what comes out must have the hashes that were noted."""
    split(flash, tmp_path / "ranks", Grid(2, 2))
    data = bytearray((tmp_path / "ranks" / name).read_bytes())
    data[-3] ^= 1
    (tmp_path / "ranks" / name).write_bytes(data)
    out = tmp_path / "out"
    assert main(["shard", str(tmp_path / "ranks"), str(out), "--tp", "2"]) == code
    assert said in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        open_checkpoint(out)


def test_a_split_that_changes_while_it_is_read(flash: Path, tmp_path: Path) -> None:
    """Any file of the checkpoint may be in any rank, so none of them may change in or between runs that read it."""
    split(flash, tmp_path / "ranks", Grid(2, 2))
    whole = open_checkpoint(tmp_path / "ranks")
    name = "model-00001-of-00006.safetensors"
    whole.files.require_unchanged(name)
    for changed in ("rank-003/model-00006-of-00006.safetensors", "v4quant.extra.safetensors"):
        before = open_checkpoint(tmp_path / "ranks").files.fingerprint(name)
        os.utime(tmp_path / "ranks" / changed, ns=(1, 1))
        assert open_checkpoint(tmp_path / "ranks").files.fingerprint(name) != before
    with pytest.raises(CheckpointError, match=r"rank-003/model-00006-of-00006\.safetensors: has changed"):
        whole.files.require_unchanged(name)


def test_memory_of_a_split_that_is_split_again(flash: Path, tmp_path: Path) -> None:
    """Its own ranks are held beside those that are written: thousands of tensors where there are many."""
    split(flash, tmp_path / "ranks", Grid(4, 2))
    whole = plan_shard(open_checkpoint(flash), Grid(2))
    again = plan_shard(open_checkpoint(tmp_path / "ranks"), Grid(2))
    held = sum(len(read(path)) for path in (tmp_path / "ranks").rglob("*.safetensors"))
    assert again.peak_memory_bytes(1) - whole.peak_memory_bytes(1) > 500 * held


def test_a_damaged_file_without_weights_is_not_passed_on(
    flash: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split(flash, tmp_path / "ranks", Grid(1, 2))
    readme = open_sharded(tmp_path / "ranks").layout.extra.entries["file/README.md"]
    data = bytearray((tmp_path / "ranks" / readme.file).read_bytes())
    data[readme.start] ^= 1
    (tmp_path / "ranks" / readme.file).write_bytes(data)
    assert main(["shard", str(tmp_path / "ranks"), str(tmp_path / "out"), "--tp", "2"]) == 1
    assert "README.md: comes out of" in capsys.readouterr().err
    assert not (tmp_path / "out" / "v4quant.shards.json").exists()


@pytest.mark.parametrize("end", [0, 1], ids=["first bytes", "last bytes"])
def test_checkpoints_that_differ_at_an_end_are_other_runs(end: int, flash: Path, tmp_path: Path) -> None:
    """Beyond the first 64 KiB and before the last nothing is looked at, so that planning reads little."""
    other = shutil.copytree(flash, tmp_path / "other")
    entries = [e for e in open_checkpoint(other).tensors.values() if e.file == "model-00004-of-00006.safetensors"]
    entry = max(entries, key=lambda e: e.stop) if end else min(entries, key=lambda e: e.start)
    data = bytearray((other / entry.file).read_bytes())
    data[entry.stop - 1 if end else entry.start] ^= 1
    (other / entry.file).write_bytes(data)
    runs = [plan_shard(open_checkpoint(folder), Grid(2), Layout.RANKS).run for folder in (flash, other)]
    assert runs[0].id != runs[1].id


def test_experts_that_are_fp8_already_make_no_other_run(tmp_path: Path) -> None:
    source = open_checkpoint(write_wide(tmp_path / "base", "flash-base"))
    assert plan_shard(source, Grid(2), fp8_experts=True).run == plan_shard(source, Grid(2)).run


@pytest.mark.parametrize("grid", [Grid(2, 2), Grid(1, 1, 3)], ids=str)
def test_disk_bytes_are_those_that_are_written(flash: Path, grid: Grid, tmp_path: Path) -> None:
    """Not less, and little more: index, record and certificate of each rank are counted."""
    plan = plan_shard(open_checkpoint(flash), grid, Layout.RANKS, max_shard_bytes=10**9)
    split(flash, tmp_path / "ranks", grid)
    written = sum(path.stat().st_size for path in (tmp_path / "ranks").rglob("*") if path.is_file())
    assert written <= plan.disk_bytes < written + 0.03 * written
