"""`verify` on sharded folders: one byte anywhere is found, copies and recoded weights included."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.conversion import convert, edit
from tests.checkpoint.sharding import shard, split, write_wide
from v4quant.checkpoint.certificate import CERTIFICATE_NAME
from v4quant.checkpoint.files import Files
from v4quant.checkpoint.header import TensorEntry
from v4quant.checkpoint.reader import SHARDS_NAME, open_checkpoint
from v4quant.checkpoint.sharding.folder import open_sharded
from v4quant.checkpoint.sharding.grid import Grid
from v4quant.checkpoint.sharding.verify import _ComparedFiles, verify_sharded
from v4quant.checkpoint.sharding.whole import WholeFiles
from v4quant.cli.main import main
from v4quant.errors import CheckpointError
from v4quant.formats.cast import Scratch


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("verify") / "source")


@pytest.fixture(scope="module")
def sharded(source: Path) -> dict[str, Path]:
    root = source.parent
    shard(source, root / "mp2", 2)
    shard(source, root / "fp8", 2, fp8_experts=True)
    split(source, root / "ranks", Grid(2, 2, 2))
    return {name: root / name for name in ("mp2", "fp8", "ranks")}


def verify(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, str]]:
    """Exit code, and reasons by tensor."""
    code = main(["verify", str(folder), *more, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    return code, {mismatch["tensor"]: mismatch["reason"] for mismatch in report["mismatches"]}


def flip(folder: Path, entry: TensorEntry) -> None:
    """Change one bit in the middle of a tensor."""
    data = bytearray((folder / entry.file).read_bytes())
    data[(entry.start + entry.stop) // 2] ^= 4
    (folder / entry.file).write_bytes(data)


@pytest.mark.parametrize("name", ["mp2", "fp8", "ranks"])
def test_whole_folders(
    name: str, source: Path, sharded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(sharded[name], capsys) == (0, {})
    assert verify(sharded[name], capsys, "--against", str(source)) == (0, {})
    convert(source, tmp_path / "bf16", "bf16")
    assert verify(sharded[name], capsys, "--against", str(tmp_path / "bf16")) == (0, {})


def test_every_rank_alone(sharded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in sorted(sharded["ranks"].glob("rank-*")):
        assert verify(folder, capsys) == (0, {})
    alone = shutil.copytree(sharded["ranks"] / "rank-005", tmp_path / "alone")
    entry = open_sharded(sharded["ranks"]).layout.held_by(5)["norm.weight"]
    path = alone / entry.file.partition("/")[2]
    data = bytearray(path.read_bytes())
    data[entry.start] ^= 1
    path.write_bytes(data)
    code, found = verify(alone, capsys)
    assert code == 1
    assert "bytes differ" in found["norm.weight"]


@pytest.mark.parametrize(
    ("name", "rank", "tensor", "reason"),
    [
        ("mp2", 1, "layers.1.attn.wkv.weight", "in model1-mp2.safetensors differs from the copy in another rank"),
        ("mp2", 1, "layers.1.attn.wo_a.weight", "in model1-mp2.safetensors is not fp8 codes times scale"),
        ("fp8", 1, "layers.0.ffn.experts.7.w1.weight", ""),
        ("fp8", 0, "layers.0.ffn.experts.1.w2.scale", ""),
        ("ranks", 2, "layers.0.attn.wq_a.weight", "in rank-002/model-00002-of-00003.safetensors differs from the copy"),
        ("ranks", 3, "embed.weight", "in rank-003/model-00001-of-00003.safetensors differs from the copy"),
        ("ranks", 7, "embed.weight", "in rank-007/model-00001-of-00004.safetensors differs from the copy"),
        ("ranks", 6, "layers.2.ffn.experts.5.w3.weight", "has another sha256 than rank-006/v4quant.certificate.jsonl"),
    ],
)
def test_one_bit(
    name: str,
    rank: int,
    tensor: str,
    reason: str,
    source: Path,
    sharded: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(sharded[name], tmp_path / "damaged")
    flip(folder, open_sharded(folder).layout.held_by(rank)[tensor])
    weight = tensor.replace(".scale", ".weight")
    for more in ([], ["--against", str(source)]):
        code, found = verify(folder, capsys, *more)
        assert code == 1
        file = open_sharded(folder).layout
        of_tensor = next(f for f, places in file.placements.items() if any(p.source.name == weight for p in places))
        assert found.keys() <= {tensor, weight, of_tensor}
        if reason and not more:
            assert reason in found[tensor]


def test_what_the_extra_file_holds(
    sharded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(["layers.1.attn.wo_a.weight", "file/README.md", "file/config.json"]):
        folder = shutil.copytree(sharded["mp2"], tmp_path / str(number))
        flip(folder, open_sharded(folder).layout.extra.entries[name])
        code = main(["verify", str(folder)])
        printed = capsys.readouterr()
        assert code in (1, 2, 3)
        assert name.removeprefix("file/") in printed.out + printed.err


def test_experts_exchanged_between_ranks(
    source: Path, sharded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes of two experts in each other's place: every file has its size and header."""
    folder = shutil.copytree(sharded["ranks"], tmp_path / "damaged")
    layout = open_sharded(folder).layout
    first = layout.held_by(0)["layers.0.ffn.experts.0.w1.weight"]
    second = layout.held_by(1)["layers.0.ffn.experts.2.w1.weight"]
    data = [bytearray((folder / entry.file).read_bytes()) for entry in (first, second)]
    parts = [bytes(own[entry.start : entry.stop]) for own, entry in zip(data, (first, second), strict=True)]
    data[0][first.start : first.stop], data[1][second.start : second.stop] = parts[1], parts[0]
    for own, entry in zip(data, (first, second), strict=True):
        (folder / entry.file).write_bytes(own)
    code, found = verify(folder, capsys, "--against", str(source))
    assert code == 1
    assert found.keys() == {first.name, second.name}
    assert all("values differ" in reason for reason in found.values())


def test_certificates_of_ranks(sharded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(sharded["ranks"], tmp_path / "damaged")
    path = folder / "rank-004" / CERTIFICATE_NAME
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    missing = json.loads(lines[-1])["tensor"]
    code, found = verify(folder, capsys)
    assert code == 1
    assert found == {missing: f"has no line in rank-004/{CERTIFICATE_NAME}"}
    path.unlink()
    assert verify(folder, capsys) == (
        1,
        {f"rank-004/{CERTIFICATE_NAME}": "is missing, expected the certificate of this rank"},
    )


def test_another_checkpoint(sharded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_wide(tmp_path / "other")
    edit(other, "layers.1.attn.wkv.weight", lambda data: data.__setitem__((0, 0), data[0, 0] ^ 0x80))
    code, found = verify(sharded["ranks"], capsys, "--against", str(other))
    assert code == 1
    assert found.keys() == {"layers.1.attn.wkv.weight"}


def first_line(**changes: object) -> Callable[[list[str]], list[str]]:
    return lambda lines: [json.dumps(json.loads(lines[0]) | changes), *lines[1:]]


def second_line(**changes: object) -> Callable[[list[str]], list[str]]:
    return lambda lines: [lines[0], json.dumps(json.loads(lines[1]) | changes), *lines[2:]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (first_line(tensors=1), "has another first line"),
        (first_line(target="rank 2 of --tp 2 --ep 2 --pp 2"), "has another first line"),
        (first_line(source_id="0" * 64), "has another first line"),
        (first_line(config_sha256="0" * 64), "has another first line"),
        (second_line(dtype="F32"), "is not what its line in rank-003"),
        (second_line(sources={}), "is not what its line in rank-003"),
        (second_line(sha256="0" * 64), "has another sha256 than rank-003"),
        (lambda lines: [*lines, lines[1]], "has two lines in rank-003"),
    ],
)
def test_a_certificate_that_says_something_else(
    change: Callable[[list[str]], list[str]],
    reason: str,
    sharded: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(sharded["ranks"], tmp_path / "edited")
    path = folder / "rank-003" / CERTIFICATE_NAME
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    code, found = verify(folder, capsys)
    assert code == 1
    assert len(found) == 1
    assert reason in next(iter(found.values()))


def test_a_damaged_scale_is_named_with_its_byte(
    sharded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an FP8 expert, whose FP4 codes and scales say what it must be."""
    folder = shutil.copytree(sharded["fp8"], tmp_path / "damaged")
    scale = open_sharded(folder).layout.held_by(0)["layers.0.ffn.experts.1.w2.scale"]
    data = bytearray((folder / scale.file).read_bytes())
    data[scale.start + 1] ^= 4
    (folder / scale.file).write_bytes(data)
    code, found = verify(folder, capsys)
    assert code == 1
    reason = f"in {scale.file} is not fp4 codes times scale, first in byte 1 of {scale.name}"
    assert found == {scale.name.replace(".scale", ".weight"): reason}


def test_tensors_of_a_file_with_another_hash_count_as_unproven(
    sharded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An expert has no copy, and DeepSeek's files no certificate: which tensor of the file it is, nothing says."""
    folder = shutil.copytree(sharded["mp2"], tmp_path / "damaged")
    flip(folder, open_sharded(folder).layout.held_by(1)["layers.0.ffn.experts.7.w1.weight"])
    assert main(["verify", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (mismatch,) = report["mismatches"]
    of_file = open_sharded(folder).layout.placements[mismatch["tensor"]]
    assert report["bit_identical"] == report["tensors"] - len(of_file)


def test_what_cannot_be_read_is_no_mismatch(sharded: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_checkpoint(sharded["ranks"])
    assert isinstance(whole.files, WholeFiles)

    def fail(*_: object) -> None:
        raise CheckpointError("x: cannot read: Too many open files") from OSError()

    monkeypatch.setattr(whole.files, "read_into", fail)
    with pytest.raises(CheckpointError, match="Too many open files"):
        verify_sharded(whole, whole.files.folder, None, progress=lambda _count, _file: None)


def test_one_buffer_whatever_the_number_of_copies(sharded: dict[str, Path]) -> None:
    """A dense tensor has a copy in each of hundreds of ranks; each is read into the same buffer."""
    scratch = Scratch()
    compared = _ComparedFiles(Files(sharded["ranks"]), scratch)
    for rank in range(4):
        path = sharded["ranks"] / f"rank-{rank:03d}" / "model-00001-of-00003.safetensors"
        data = path.read_bytes()[:1000]
        compared[f"rank-{rank:03d}/{path.name}"].write(memoryview(data), 0)
    assert not compared.found
    assert sum(buffer.size for buffer in scratch._slots.values()) == 1000


RankChange = Callable[[Path, Path], object]


def in_record(**changes: object) -> RankChange:
    def change(folder: Path, _: Path) -> None:
        record = json.loads((folder / SHARDS_NAME).read_text())
        (folder / SHARDS_NAME).write_text(json.dumps(record | changes))

    return change


def move_cut(folder: Path, _: Path) -> None:
    record = json.loads((folder / SHARDS_NAME).read_text())
    record["cut"]["embed.weight"]["start"] = 0
    (folder / SHARDS_NAME).write_text(json.dumps(record))


def whole_in_record(folder: Path, _: Path) -> None:
    record = json.loads((folder / SHARDS_NAME).read_text())
    del record["cut"]["embed.weight"]
    (folder / SHARDS_NAME).write_text(json.dumps(record))


RANK_RECORDS: dict[str, tuple[RankChange, str]] = {
    "of the rank before": (lambda folder, other: shutil.copy(other / SHARDS_NAME, folder), "says of experts"),
    "another rank": (in_record(rank=1), "says of place what is not so"),
    "a copy's rank": (in_record(rank=7, place={"tp": 1, "ep": 1, "pp": 1}), "is not of the rank and the run"),
    "another run": (in_record(run="0" * 64), "is not of the rank and the run"),
    "other experts": (in_record(experts=[0, 2]), "says of experts what is not so"),
    "other layers": (in_record(layers=[0, 3]), "says of layers what is not so"),
    "a share moved": (move_cut, "says of cut what is not so"),
    "a share called whole": (whole_in_record, "says of cut what is not so"),
    "no such rank": (in_record(rank=8), "says of rank what is not so"),
    "no such grid": (in_record(grid={"tp": 0, "ep": 2, "pp": 2}), "says of grid what is not so"),
    "a grid of text": (in_record(grid="x"), "says of grid what is not so"),
    "another number of ranks": (in_record(ranks=4), "says of ranks what is not so"),
}


@pytest.mark.parametrize("case", RANK_RECORDS)
def test_a_rank_whose_record_is_not_its_own(
    case: str, sharded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What says which part of the model this is must fit the files that lie beside it."""
    change, reason = RANK_RECORDS[case]
    folder = shutil.copytree(sharded["ranks"] / "rank-003", tmp_path / "rank")
    change(folder, sharded["ranks"] / "rank-002")
    code, found = verify(folder, capsys)
    assert code == 1
    assert any(reason in what for what in found.values()), found


def test_a_rank_without_config(sharded: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(sharded["ranks"] / "rank-003", tmp_path / "rank")
    (folder / "config.json").unlink()
    assert main(["verify", str(folder)]) == 3
    assert "has no config.json" in capsys.readouterr().err
