"""Damage in every output format, and damage to what surrounds the values; expected values come from the oracle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.checkpoint.conversion import Tensors, convert, edit, find, rewrite, stored, write_small
from tests.formats import oracle
from v4quant.checkpoint.certificate import CERTIFICATE_NAME
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.checkpoint.verify import verify_hashes, verify_values
from v4quant.checkpoint.verify_report import VerifyReport
from v4quant.cli.main import main

Bytes = npt.NDArray[np.uint8]
EXPERT = "layers.0.ffn.experts.1.w2.weight"
DENSE = "layers.0.attn.wq_a.weight"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """native/, fp8/, bf16/ and base/ from one synthetic checkpoint; native/ is converted, too, so that it has proof."""
    root = tmp_path_factory.mktemp("outputs")
    write_small(root / "source", mtp=True)
    for target in ("native", "fp8", "bf16", "base"):
        convert(root / "source", root / target, target)
    return root


def values_of(folder: Path, weight: str) -> oracle.Float64:
    tensors = stored(folder)
    with np.errstate(invalid="ignore"):
        return oracle.decode(tensors[weight], tensors.get(f"{weight.removesuffix('weight')}scale"))


def swap_nibbles(rows: Bytes) -> None:
    rows[...] = (rows << 4) | (rows >> 4)


def lose_a_negative_zero(rows: Bytes) -> None:
    """The first -0 of a BF16 tensor becomes +0."""
    bits = rows.view(np.uint16)
    bits[tuple(np.argwhere(bits == 0x8000)[0])] = 0


def lose_an_fp4_negative_zero(rows: Bytes) -> None:
    row, column = np.argwhere((rows & 0x0F) == 8)[0]
    rows[row, column] &= 0xF0


def scale_aside(rows: Bytes) -> None:
    rows.view(np.float32)[...] = np.roll(rows.view(np.float32), 1, axis=0)


def least_f32_step(rows: Bytes) -> None:
    rows.view(np.uint32)[0, 0] += 1  # the next float32: no power of two, so compared in float64


def least_bf16_step(rows: Bytes) -> None:
    rows.view(np.uint16)[-1, -1] ^= 1


def infinite(rows: Bytes) -> None:
    rows.view(np.uint16)[4, 4] = 0x7F80


DAMAGE: list[tuple[str, str, str, Callable[[Bytes], None]]] = [
    ("native", EXPERT, EXPERT, swap_nibbles),
    ("native", EXPERT, EXPERT, lose_an_fp4_negative_zero),
    ("native", EXPERT.replace("weight", "scale"), EXPERT, lambda rows: rows.__setitem__((9, 1), rows[9, 1] ^ 1)),
    ("base", DENSE.replace("weight", "scale"), DENSE, least_f32_step),
    ("base", EXPERT.replace("weight", "scale"), EXPERT, scale_aside),
    ("bf16", EXPERT, EXPERT, least_bf16_step),
    ("bf16", EXPERT, EXPERT, lose_a_negative_zero),
    ("bf16", DENSE, DENSE, infinite),
]


@pytest.mark.parametrize(
    ("target", "tensor", "weight", "change"),
    DAMAGE,
    ids=[f"{target}-{change.__name__}" for target, *_, change in DAMAGE],
)
def test_values_are_found_in_every_format(
    outputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    target: str,
    tensor: str,
    weight: str,
    change: Callable[[Bytes], None],
) -> None:
    """By the command line: exit 1, one mismatch, the weight's name, the first coordinate and both values."""
    damaged = shutil.copytree(outputs / target, tmp_path / "damaged")
    edit(damaged, tensor, change)
    expected, found = values_of(outputs / "source", weight), values_of(damaged, weight)
    first = tuple(int(index) for index in np.argwhere(oracle.differs(found, expected))[0])
    assert main(["verify", str(damaged), "--against", str(outputs / "source"), "--json"]) == 1
    [mismatch] = json.loads(capsys.readouterr().out)["mismatches"]
    assert mismatch["tensor"] == weight
    assert tuple(mismatch["coordinate"]) == first
    for key, value in (("expected", expected[first]), ("found", found[first])):
        assert float(mismatch[key]) == value
        assert np.signbit(float(mismatch[key])) == np.signbit(value)
    assert main(["verify", str(damaged), "--json"]) == 1
    [mismatch] = json.loads(capsys.readouterr().out)["mismatches"]
    assert mismatch["tensor"] == tensor
    assert mismatch["expected"] != mismatch["found"]


def test_formats_verify_against_each_other(outputs: Path) -> None:
    """Whatever two forms hold the same values, either may be the source."""
    for one in ("native", "fp8", "bf16", "base"):
        for other in ("source", "fp8", "bf16", "base"):
            report = verify_values(open_checkpoint(outputs / one), open_checkpoint(outputs / other))
            assert report.ok, (one, other, report.mismatches)


def drop_mtp(folder: Path) -> None:
    """The whole MTP block, from the shards and from the index, as converters do that skip its names."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    dropped = [name for name in index["weight_map"] if name.startswith("mtp.")]
    (folder / index["weight_map"][dropped[0]]).unlink()
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in dropped}
    path.write_text(json.dumps(index))


def in_shard(tensor: str, change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path, _ = find(folder, tensor)
        rewrite(path, change)

    return damage


def as_f16(tensors: Tensors) -> None:
    dtype, shape, data = tensors["layers.0.attn_norm.weight"]
    assert dtype == "BF16"
    tensors["layers.0.attn_norm.weight"] = ("F16", shape, data)


def transposed(tensors: Tensors) -> None:
    dtype, shape, data = tensors[EXPERT]
    tensors[EXPERT] = (dtype, (shape[1] * 2, shape[0] // 2), data)


def extra(tensors: Tensors) -> None:
    tensors["layers.0.attn.wq_c.weight"] = ("BF16", (1,), b"\0\0")


def set_total_size(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))


def of_another_model(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_attention_heads": 8}))


SURROUNDINGS: list[tuple[Callable[[Path], None], str]] = [
    (drop_mtp, "mtp.0.ffn.experts.1.w2.weight"),
    (in_shard(EXPERT, as_f16), "layers.0.attn_norm.weight"),
    (in_shard(EXPERT, transposed), EXPERT),
    (in_shard(EXPERT, extra), "layers.0.attn.wq_c.weight"),
    (in_shard(EXPERT, lambda tensors: tensors.pop("layers.0.attn.attn_sink")), "layers.0.attn.attn_sink"),
    (set_total_size, "model.safetensors.index.json"),
    (of_another_model, "config.json"),
]


@pytest.mark.parametrize(
    ("damage", "named"), SURROUNDINGS, ids=["MTP", "dtype", "shape", "extra", "F32 table", "total_size", "model"]
)
def test_what_surrounds_the_values(outputs: Path, tmp_path: Path, damage: Callable[[Path], None], named: str) -> None:
    """Found by hash and by value alike."""
    damaged = shutil.copytree(outputs / "fp8", tmp_path / "damaged")
    damage(damaged)
    checkpoint = open_checkpoint(damaged)
    reports = [verify_hashes(checkpoint), verify_values(checkpoint, open_checkpoint(outputs / "source"))]
    for report in reports:
        assert not report.ok
        assert named in {mismatch.tensor for mismatch in report.mismatches}


def verified(folder: Path, source: Path) -> list[VerifyReport]:
    checkpoint = open_checkpoint(folder)
    return [verify_hashes(checkpoint), verify_values(checkpoint, open_checkpoint(source))]


def test_a_verdict_that_hides_rounding_is_found(outputs: Path, tmp_path: Path) -> None:
    """A certificate edited to call a rounded tensor exact does not make it so."""
    source, out = shutil.copytree(outputs / "bf16", tmp_path / "source"), tmp_path / "out"
    edit(source, EXPERT, least_bf16_step)
    convert(source, out, "native", allow_rounding=True)
    assert all(report.ok for report in verified(out, source))

    def exact(line: dict[str, Any]) -> dict[str, Any]:
        return line | {"verdict": "value_exact"} if line.get("verdict") == "rounded" else line

    path = out / CERTIFICATE_NAME
    lines = [json.dumps(exact(json.loads(line))) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    assert not verified(out, source)[1].ok


def test_workers_change_nothing(outputs: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(outputs / "fp8", tmp_path / "damaged")
    for tensor in (EXPERT, DENSE):
        edit(damaged, tensor, lambda rows: rows.__setitem__((0, 0), rows[0, 0] ^ 1))
    checkpoint, source = open_checkpoint(damaged), open_checkpoint(outputs / "source")
    for one, four in (
        [verify_hashes(checkpoint, workers=workers) for workers in (1, 4)],
        [verify_values(checkpoint, source, workers=workers) for workers in (1, 4)],
    ):
        assert (one.mismatches, one.verdicts) == (four.mismatches, four.verdicts)
        assert [mismatch.tensor for mismatch in one.mismatches] == [DENSE, EXPERT]


def test_progress_counts_every_byte_of_the_output(outputs: Path) -> None:
    checkpoint, source = open_checkpoint(outputs / "fp8"), open_checkpoint(outputs / "source")
    hashed: list[int] = []
    verify_hashes(checkpoint, progress=lambda count, _file: hashed.append(count))
    assert sum(hashed) == checkpoint.bytes
    compared: list[int] = []
    verify_values(checkpoint, source, progress=lambda count, _file: compared.append(count))
    assert sum(compared) == checkpoint.bytes
