"""Rank files that are missing, doubled, renamed, cut, damaged or of another run; disks and folders that refuse."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.sharding import merge, shard, write_wide
from tests.checkpoint.test_disk import fail_at
from v4quant.checkpoint import output
from v4quant.checkpoint.header import build_header
from v4quant.checkpoint.journal import Journal, Record, lock_journal
from v4quant.checkpoint.reader import JOURNAL_NAME, SHARDS_NAME, open_checkpoint
from v4quant.checkpoint.sharding import folder as folder_module
from v4quant.checkpoint.sharding import shard as shard_module
from v4quant.checkpoint.sharding.folder import open_sharded
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.checkpoint.sharding.outputs import files_of
from v4quant.checkpoint.sharding.rank_files import ExtraTensors, Run
from v4quant.checkpoint.sharding.record import FileRecord, ShardsRecord
from v4quant.checkpoint.sharding.rules import Layout
from v4quant.checkpoint.sharding.shard import apply_shard, plan_shard
from v4quant.cli.main import main
from v4quant.config import CONFIG_NAME
from v4quant.errors import CheckpointError, OutputError
from v4quant.testing.asserts import assert_same_checkpoint

EXTRA = "v4quant.extra.safetensors"
FIRST, SECOND = "model0-mp2.safetensors", "model1-mp2.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("errors") / "source")


@pytest.fixture(scope="module")
def others(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the same checkpoint and of one with other numbers, in two and four ranks."""
    root = tmp_path_factory.mktemp("others")
    other_seed = write_wide(root / "other-source", seed=1)
    shard(source, root / "same", 2)
    shard(other_seed, root / "seed", 2)
    shard(source, root / "four", 4)
    shard(source, root / "fp8", 2, fp8_experts=True)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def sharded(others: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(others["same"], tmp_path / "sharded")


Break = Callable[[Path, dict[str, Path]], object]


def remove(name: str) -> Break:
    return lambda folder, _: (folder / name).unlink()


def rename(name: str, new: str) -> Break:
    return lambda folder, _: (folder / name).rename(folder / new)


def copy(name: str, new: str) -> Break:
    return lambda folder, _: shutil.copy(folder / name, folder / new)


def take(other: str, name: str, new: str = "") -> Break:
    return lambda folder, others: shutil.copy(others[other] / name, folder / (new or name))


def cut(name: str, count: int) -> Break:
    return lambda folder, _: os.truncate(folder / name, (folder / name).stat().st_size - count)


def grow(name: str) -> Break:
    return lambda folder, _: (folder / name).write_bytes((folder / name).read_bytes() + b"\0")


def swap(folder: Path, _: dict[str, Path]) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def in_header(name: str, old: bytes, new: bytes) -> Break:
    def change(folder: Path, _: dict[str, Path]) -> None:
        data = (folder / name).read_bytes()
        assert len(old) == len(new)
        assert old in data
        (folder / name).write_bytes(data.replace(old, new, 1))

    return change


def strip_metadata(folder: Path, _: dict[str, Path]) -> None:
    """As DeepSeek's own converter would have written it."""
    data = (folder / SECOND).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    text = json.dumps(header).encode()
    (folder / SECOND).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def in_record(**changes: Any) -> Break:
    def change(folder: Path, _: dict[str, Path]) -> None:
        record = json.loads((folder / SHARDS_NAME).read_text())
        (folder / SHARDS_NAME).write_text(json.dumps(record | changes))

    return change


def with_weight(name: str) -> Break:
    def change(folder: Path, _: dict[str, Path]) -> None:
        record = json.loads((folder / SHARDS_NAME).read_text())
        record["weights"][name] = next(iter(record["weights"].values()))
        (folder / SHARDS_NAME).write_text(json.dumps(record))

    return change


def with_file(name: str) -> Break:
    def change(folder: Path, _: dict[str, Path]) -> None:
        record = json.loads((folder / SHARDS_NAME).read_text())
        record["files"][name] = record["files"]["config.json"]
        (folder / SHARDS_NAME).write_text(json.dumps(record))

    return change


CASES: dict[str, tuple[Break, str]] = {
    "a rank is missing": (remove(SECOND), f"{SECOND}: is missing, expected 2 rank files"),
    "the extra file is missing": (remove(EXTRA), f"{EXTRA}: is missing"),
    "the record is missing": (remove(SHARDS_NAME), f"has no {SHARDS_NAME}"),
    "a rank renamed": (rename(SECOND, "model2-mp2.safetensors"), "model2-mp2.safetensors: holds rank 1 of 2"),
    "a rank renamed to something": (rename(SECOND, "second.safetensors"), "second.safetensors: holds rank 1 of 2"),
    "the extra file renamed": (rename(EXTRA, "extra.safetensors"), "extra.safetensors: holds the extra file"),
    "a rank doubled": (copy(SECOND, "model01-mp2.safetensors"), "model01-mp2.safetensors: holds rank 1 of 2"),
    "a rank doubled as a copy": (copy(FIRST, "model0-mp2 (1).safetensors"), "(1).safetensors: holds rank 0 of 2"),
    "a rank in the place of another": (copy(FIRST, SECOND), f"{SECOND}: holds rank 0, expected rank 1"),
    "ranks swapped": (swap, f"{FIRST}: holds rank 1, expected rank 0"),
    "a rank of another checkpoint": (take("seed", SECOND), f"{SECOND}: is of another run"),
    "the first rank of another checkpoint": (take("seed", FIRST), f"{FIRST}: is of another run"),
    "the extra file of another checkpoint": (take("seed", EXTRA), f"{EXTRA}: is of another run"),
    "the record of another checkpoint": (take("seed", SHARDS_NAME), f"{EXTRA}: is of another run"),
    "a rank with FP8 experts": (take("fp8", SECOND), f"{SECOND}: is of another run"),
    "a rank of another number": (take("four", "model1-mp4.safetensors", SECOND), "is of a set of 4 ranks, expected 2"),
    "ranks of two numbers": (take("four", "model3-mp4.safetensors"), "model3-mp4.safetensors: holds rank 3 of 4"),
    "the record of another number": (take("four", SHARDS_NAME), f"{EXTRA}: is of a set of 2 ranks, expected 4"),
    "a rank cut in its data": (cut(SECOND, 1000), f"{SECOND}: is truncated: has "),
    "a rank cut in its header": (cut(FIRST, 3_000_000), f"{FIRST}: is truncated"),
    "the extra file cut": (cut(EXTRA, 1), f"{EXTRA}: is truncated"),
    "a rank that grew": (grow(SECOND), f"{SECOND}: has 1 bytes after its last tensor"),
    "an empty rank": (lambda folder, _: (folder / SECOND).write_bytes(b""), f"{SECOND}: is truncated: has 0 bytes"),
    "a rank that is no safetensors": (
        lambda folder, _: (folder / SECOND).write_bytes(b"\x80\x02ctorch" * 99),
        f"{SECOND}: claims a header of",
    ),
    "a rank without our metadata": (strip_metadata, f"{SECOND}: was not written by v4quant shard"),
    "a tensor renamed in a header": (
        in_header(SECOND, b"layers.0.attn.wkv.weight", b"layers.0.attn.wkx.weight"),
        f"{SECOND}: its header is not the one",
    ),
    "a kept header damaged": (
        in_header(EXTRA, b'"embed.weight":{', b'"embed.weighX":{'),
        f"{EXTRA}: kept headers: 'embed.weighX' is no tensor",
    ),
    "a kept header of another dtype": (
        in_header(EXTRA, b'wo_b.scale":{"dtype":"F8_E8M0"', b'wo_b.scale":{"dtype":"F8_E4M3"'),
        f"{FIRST}: its header is not the one",
    ),
    "a kept header of other dimensions": (
        in_header(EXTRA, b'attn_sink":{"dtype":"F32","shape":[8]', b'attn_sink":{"dtype":"F32","shape":[9]'),
        f"{EXTRA}: kept header of model-00002-of-00006.safetensors",
    ),
    "a record that is no JSON": (lambda folder, _: (folder / SHARDS_NAME).write_text("{"), "not valid JSON"),
    "a record of another version": (in_record(shards=1), "is no record of version 2"),
    "a record without a run": (in_record(run="x"), "run is not that of the options"),
    "a record without a source": (in_record(source="x"), "source is no hash"),
    "a record of no ranks": (in_record(tp=0), "tp is no number"),
    "a record of true ranks": (in_record(tp=True), "tp is no number"),
    "a record of many ranks": (in_record(tp=10**9), "tp is no number"),
    "a record of stages": (in_record(pp=2), "expected ep and pp to be 1"),
    "a record of ranks by the million": (in_record(layout="ranks", tp=1024, ep=1024), "at most 1,024"),
    "a record of another layout": (in_record(layout="x"), "layout is none of deepseek, ranks"),
    "a record of another packing": (in_record(packing="x"), "packing is none of layer, full, one"),
    "a record of another limit": (in_record(max_shard_bytes=5), "run is not that of the options"),
    "a record of files without a limit": (in_record(max_shard_bytes=-1), "max_shard_bytes is no number"),
    "a record of other experts": (in_record(fp8_experts=1), "fp8_experts is neither"),
    "a record of no weights": (in_record(weights={}), "lists no weight files"),
    "a record of no files": (in_record(files=[]), "files is no object of files"),
    "a weight file without a hash": (in_record(weights={"a.safetensors": {"bytes": 1}}), "has no bytes and sha256"),
    "a weight file outside": (with_weight("../a.safetensors"), "is no name of a weight file"),
    "an absolute weight file": (with_weight("/tmp/a.safetensors"), "is no name of a weight file"),
    "a weight file that no one kept": (with_weight("a.safetensors"), f"{EXTRA}: has no header of a.safetensors"),
    "a file outside": (with_file("../../evil"), "is no name of a file"),
    "a file of the shell": (with_file(".bashrc"), "is no name of a file"),
    "a file with a control character": (with_file("a\x1b[2Jb"), "is no name of a file"),
    "a file in a file": (with_file("README.md/a"), "is no name of a file without weights"),
    "a file that is a shard": (with_file("model-00001-of-00006.safetensors"), "is no name of a file without weights"),
    "a journal": (with_file(JOURNAL_NAME), "is no name of a file"),
    "a record of a sharded folder": (with_file(SHARDS_NAME), "is no name of a file"),
    "a file in a folder in a file": (with_file("README.md/a/b"), "is no name of a file without weights"),
    "a file that no one kept": (with_file("more.txt"), f"{EXTRA}: its header is not the one"),
}


@pytest.mark.parametrize("case", CASES)
def test_merge_refuses(
    case: str, sharded: Path, others: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 3, one line that names the file, nothing written."""
    break_it, says = CASES[case]
    break_it(sharded, others)
    out = tmp_path / "out"
    assert main(["merge", str(sharded), str(out), "--json"]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    message, hint = printed.err.removesuffix("\n").split("\nhint: ")
    assert message.startswith(f"error: {sharded}")
    assert says in message
    assert "\n" not in message + hint
    assert "Traceback" not in printed.err
    assert not out.exists()


def hostile(folder: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], grid: Grid, *, files: int = 0) -> Path:
    """A sharded folder without ranks, whose record and extra file tell of these tensors, and of so many files."""
    header, entries = build_header(tensors, file="model.safetensors")
    run = Run(grid, Layout.RANKS, "0" * 64, max_shard_bytes=10**9)
    kept = {CONFIG_NAME: 0} | {f"{number}/a": 0 for number in range(files)}
    extra = ExtraTensors({"model.safetensors": len(header)}, kept).file([], run)
    (folder / EXTRA).write_bytes(extra.header + header)
    size = max(entry.stop for entry in entries)
    weights = {"model.safetensors": FileRecord("model.safetensors", size, "0" * 64)}
    record = ShardsRecord(run, weights, {name: FileRecord(name, 0, "0" * 64) for name in kept})
    (folder / SHARDS_NAME).write_bytes(record.to_bytes("0"))
    return folder


def test_kept_headers_that_cannot_be_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half bytes, and more tensors, or copies of them in ranks by the thousand, than memory should be asked for."""
    odd = hostile(tmp_path, [("layers.0.attn.wq_b.weight", "F4", (2, 3, 2))], Grid(4))
    with pytest.raises(CheckpointError, match=r"wq_b.weight is F4 \[2, 3, 2\], not to be cut into 4"):
        open_sharded(odd)
    odd = hostile(tmp_path, [("layers.0.attn.wo_b.weight", "F4", (2, 2))], Grid(2))
    with pytest.raises(CheckpointError, match="not to be cut into 2"):
        open_sharded(odd)
    many = [(f"layers.{number}.attn_norm.weight", "BF16", (1,)) for number in range(3_000)]
    with pytest.raises(CheckpointError, match="3,072,000 tensors in all ranks together, expected at most 3,000,000"):
        open_sharded(hostile(tmp_path, many, Grid(1, 1024)))
    monkeypatch.setattr(folder_module, "MAX_TENSORS", 2_999)
    with pytest.raises(CheckpointError, match="tells of more than 2,999 tensors"):
        open_sharded(hostile(tmp_path, many, Grid(1)))


def test_a_record_of_many_files_is_read_in_one_pass(tmp_path: Path) -> None:
    """50,000 files; with a set of all made for each of them this took six minutes."""
    folder = hostile(tmp_path, [("layers.0.attn_norm.weight", "BF16", (1,))], Grid(1), files=50_000)
    with pytest.raises(CheckpointError, match="is missing, expected 1 folders of ranks"):
        open_sharded(folder)


@pytest.mark.parametrize("name", ["a\\b.txt", "rank-000", "rank-001/a.txt", "y" * 252])
def test_names_that_merge_would_refuse_are_not_sharded(name: str, tmp_path: Path) -> None:
    """What could not be put together again is not taken apart."""
    source = write_wide(tmp_path / "source")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("mine")
    with pytest.raises(CheckpointError, match=r"is no name of a file|where the folder of a rank will be") as refusal:
        plan_shard(open_checkpoint(source), Grid(2), Layout.RANKS)
    assert "Rename" in str(refusal.value.hint)


def test_weight_files_that_merge_would_refuse_are_not_sharded(tmp_path: Path) -> None:
    source = write_wide(tmp_path / "source")
    first = "model-00001-of-00006.safetensors"
    (source / first).rename(source / "a\\b.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(first, "a\\\\b.safetensors"))
    with pytest.raises(CheckpointError, match="is no name of a weight file"):
        plan_shard(open_checkpoint(source), Grid(2))


def test_what_is_not_ours_does_not_matter(sharded: Path, source: Path, tmp_path: Path) -> None:
    """Side files and weights of something else beside the ranks."""
    (sharded / "README.md").write_text("edited")
    (sharded / "encoding" / "encoding.py").unlink()
    shutil.copy(source / "model-00001-of-00006.safetensors", sharded / "adapter.safetensors")
    merge(sharded, tmp_path / "out")
    assert_same_checkpoint(tmp_path / "out", source)


def flip(path: Path, tensor: str) -> None:
    """Flip a bit in the middle of a tensor."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    data[8 + length + (start + stop) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "tensor", "damaged"),
    [
        (SECOND, "embed.weight", "model-00001-of-00006.safetensors"),
        (SECOND, "layers.1.attn.wo_b.weight", "model-00003-of-00006.safetensors"),
        (SECOND, "layers.2.ffn.experts.7.w3.weight", "model-00004-of-00006.safetensors"),
        (FIRST, "norm.weight", "model-00005-of-00006.safetensors"),
        (EXTRA, "layers.1.attn.wo_a.weight", "model-00003-of-00006.safetensors"),
        (EXTRA, "file/config.json", "config.json"),
        (EXTRA, "file/README.md", "README.md"),
    ],
)
def test_a_flipped_bit_is_found_and_nothing_looks_whole(
    file: str,
    tensor: str,
    damaged: str,
    sharded: Path,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flip(sharded / file, tensor)
    out = tmp_path / "out"
    assert main(["merge", str(sharded), str(out)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {damaged}: comes out of {sharded} with sha256 ")
    assert not (out / damaged).exists()
    assert not (out / "config.json").exists()
    assert not list(out.rglob("*.partial"))
    for path in out.rglob("*.safetensors"):
        assert path.read_bytes() == (source / path.name).read_bytes()
    with pytest.raises(CheckpointError, match=r"is an unfinished conversion|no such folder"):
        open_checkpoint(out)


def test_a_sharded_folder_without_its_record_is_no_checkpoint(
    sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sharded / SHARDS_NAME).unlink()
    for command in (["inspect", str(sharded)], ["convert", str(sharded), "out", "--to", "fp8"]):
        assert main(command) == 3
        assert f"of what v4quant shard wrote, {SHARDS_NAME} is missing" in capsys.readouterr().err


def test_the_extra_file_has_no_name_before_it_is_whole(
    source: Path, others: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are in it, files without weights not yet: a run that ends here goes on with them."""

    def fail(*_: object) -> None:
        raise OutputError("no room")

    with monkeypatch.context() as patched, pytest.raises(OutputError, match="no room"):
        patched.setattr(shard_module, "_write_kept", fail)
        shard(source, tmp_path / "out", 2)
    assert not (tmp_path / "out" / EXTRA).exists()
    assert shard(source, tmp_path / "out", 2).resumed_files == 6
    assert_same_checkpoint(tmp_path / "out", others["same"])


def test_files_that_have_their_names_are_gone_on_with(
    source: Path, others: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks are named, but what is missing makes every source file unfinished; then the disk is full."""
    out = tmp_path / "out"

    def fail(*_: object) -> None:
        raise OutputError("no room")

    with monkeypatch.context() as patched, pytest.raises(OutputError, match="no room"):
        patched.setattr(shard_module, "_write_kept", fail)
        shard(source, out, 2)
    (out / f"{EXTRA}.partial").unlink()
    with monkeypatch.context() as patched, pytest.raises(OutputError):
        fail_at(patched, "posix_fallocate", 0, errno.ENOSPC)
        shard(source, out, 2)
    shard(source, out, 2)
    assert_same_checkpoint(out, others["same"])


def test_data_is_durable_before_the_journal_speaks_of_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut loses what was not synced: no kill does, so the order of the calls is looked at."""
    plan = plan_shard(open_checkpoint(source), Grid(2))
    synced: set[str] = set()
    sync, append = output.ShardFile.sync, Journal.append

    def note(file: output.ShardFile) -> None:
        sync(file)
        synced.add(file.path.name)

    def check(journal: Journal, name: str, records: Sequence[Record]) -> None:
        assert synced >= files_of(plan.layout)[name]
        synced.clear()
        append(journal, name, records)

    monkeypatch.setattr(output.ShardFile, "sync", note)
    monkeypatch.setattr(Journal, "append", check)
    apply_shard(plan, tmp_path / "out")


def test_an_unfinished_folder_is_not_merged(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(OutputError):
        fail_at(monkeypatch, "fsync", 20, errno.EIO)
        shard(source, out, 2, workers=1)
    for opened in (open_sharded, open_checkpoint):
        with pytest.raises(CheckpointError, match="is an unfinished"):
            opened(out)


@pytest.mark.parametrize(
    ("name", "calls", "number"),
    [
        ("posix_fallocate", range(3), errno.ENOSPC),
        ("pwrite", [0, 1, 10, 100, 300], errno.ENOSPC),
        ("fsync", range(0, 30, 3), errno.EDQUOT),
        ("replace", range(9), errno.ENOSPC),
    ],
)
@pytest.mark.parametrize("command", ["shard", "merge"])
def test_a_disk_that_is_full_sooner_or_later(
    command: str,
    name: str,
    calls: list[int],
    number: int,
    source: Path,
    others: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit 5, one message, nothing that looks whole; with room again the same command goes on."""
    failed = 0
    expected, last = (others["same"], SHARDS_NAME) if command == "shard" else (source, "config.json")
    for call in calls:
        out = tmp_path / str(call)
        before = [str(source), str(out), "--tp", "2"] if command == "shard" else [str(others["same"]), str(out)]
        with pytest.MonkeyPatch.context() as monkeypatch:
            fail_at(monkeypatch, name, call, number)
            code = main([command, *before])
        errors = capsys.readouterr().err
        if code == 0:
            break
        failed += 1
        assert code == 5, errors
        assert errors.count("error:") == 1
        assert os.strerror(number) in errors
        complete = (out / last).exists() and not (out / JOURNAL_NAME).exists()
        assert main([command, *before]) == (5 if complete else 0), (name, call, errors)
        assert_same_checkpoint(out, expected)
        shutil.rmtree(out)
    assert failed > 2


@pytest.mark.parametrize("command", ["shard", "merge"])
def test_a_disk_that_is_too_small_is_refused_before_writing(
    command: str,
    source: Path,
    sharded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    argv = ["shard", str(source), str(out), "--tp", "2"] if command == "shard" else ["merge", str(sharded), str(out)]
    monkeypatch.setattr(output, "free_bytes", lambda _folder: 1_000_000)
    assert main(argv) == 5
    assert "1,000,000 are free" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("command", ["shard", "merge"])
def test_output_folders(
    command: str,
    source: Path,
    sharded: Path,
    others: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not empty, in use, or within what is read; --overwrite replaces what was a checkpoint or ranks of one."""
    out = tmp_path / "out"
    expected = others["same"] if command == "shard" else source

    def run(where: Path, *more: str) -> int:
        capsys.readouterr()
        read = [str(source), str(where), "--tp", "2"] if command == "shard" else [str(sharded), str(where)]
        return main([command, *read, *more])

    shutil.copytree(others["four"] if command == "merge" else source, out)
    (out / "notes.txt").write_text("mine")
    assert run(out) == 5
    assert "is not empty" in capsys.readouterr().err
    assert run(out, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert_same_checkpoint(out, expected)
    inside = (source if command == "shard" else sharded) / "inside"
    assert run(inside, "--overwrite") == 5
    assert "overlaps with the checkpoint that is read" in capsys.readouterr().err
    (tmp_path / "used").mkdir()
    other = lock_journal(tmp_path / "used")
    assert run(tmp_path / "used") == 5
    assert "another run is writing into this folder" in capsys.readouterr().err
    other.close()


def test_a_conversion_over_ranks_leaves_none_behind(source: Path, sharded: Path) -> None:
    assert main(["convert", str(source), str(sharded), "--to", "fp8", "--overwrite"]) == 0
    assert not open_checkpoint(sharded).problems
    assert not (sharded / SHARDS_NAME).exists()


def write_again(path: Path) -> None:
    path.write_bytes(path.read_bytes())


def replace(path: Path) -> None:
    """Another file at this path; whoever has the old one open reads on in that."""
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    new.replace(path)


@pytest.mark.parametrize("change", [write_again, replace])
@pytest.mark.parametrize("name", ["model-00001-of-00006.safetensors", "model-00004-of-00006.safetensors"])
def test_a_source_that_changes_while_it_is_read(name: str, change: Callable[[Path], None], tmp_path: Path) -> None:
    source, out = write_wide(tmp_path / "source"), tmp_path / "out"
    changed = iter([source / name])

    def advance(_count: int, file: str) -> None:
        if file == name:  # its header and a tensor are read
            for path in changed:
                change(path)

    with pytest.raises(CheckpointError, match=name) as caught:
        apply_shard(plan_shard(open_checkpoint(source), Grid(2)), out, workers=1, progress=lambda _done: advance)
    assert caught.value.hint
    assert not (out / SHARDS_NAME).exists()
    assert not list(out.glob("*.safetensors"))


def run_with_open_files(soft: int, hard: int, argv: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run a command line in a process that may have so many files open, or raise its limit to `hard`."""
    code = (
        "import resource, sys; from v4quant.cli.main import main; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)


def test_few_open_files(source: Path, tmp_path: Path) -> None:
    """All of a rank's files grow together where the checkpoint is one file; two descriptors each."""
    single = tmp_path / "single"
    shutil.copytree(source, single, ignore=shutil.ignore_patterns("model*"))
    tensors: dict[str, torch.Tensor] = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    save_file(tensors, single / "model.safetensors")
    argv = ["shard", str(single), str(tmp_path / "out"), "--ep", "4", "--max-shard-size", "100kB"]
    refused = run_with_open_files(60, 60, argv)
    assert refused.returncode in (3, 5)
    assert "Too many open files\nhint: Allow more open files (ulimit -n)" in refused.stderr
    allowed = run_with_open_files(120, 4096, argv)
    assert allowed.returncode == 0, allowed.stderr
    assert len(list((tmp_path / "out").rglob("*.safetensors"))) > 200
    merge(tmp_path / "out", tmp_path / "back")
    (tmp_path / "back" / "v4quant.certificate.jsonl").unlink()
    assert_same_checkpoint(tmp_path / "back", single)
