"""Every kind of damage to a converted checkpoint is found, named, and, where it is a value, given its coordinate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from v4quant.checkpoint.certificate import CERTIFICATE_NAME
from v4quant.checkpoint.header import build_header
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.checkpoint.verify import verify_hashes, verify_values
from v4quant.checkpoint.verify_report import Mismatch, VerifyReport

from .conversion import Array, convert, write_small

EXPERT = "layers.0.ffn.experts.1.w2"
DENSE = "layers.0.attn.wq_a"
NORM = "layers.0.attn.q_norm.weight"
TABLE = "layers.0.ffn.gate.tid2eid"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("verify") / "native", mtp=True)


@pytest.fixture(scope="module")
def sound(native: Path) -> Path:
    convert(native, native.parent / "fp8", "fp8")
    return native.parent / "fp8"


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "damaged")


def stored_array(folder: Path, tensor: str, dtype: type[np.generic] = np.uint8) -> Array:
    """A tensor's bytes on disk, in its header's shape; what is assigned is written."""
    entry = open_checkpoint(folder).tensors[tensor]
    return np.memmap(folder / entry.file, dtype, "r+", entry.start, entry.shape)


def by_hash(folder: Path) -> VerifyReport:
    return verify_hashes(open_checkpoint(folder))


def by_value(folder: Path, source: Path) -> VerifyReport:
    return verify_values(open_checkpoint(folder), open_checkpoint(source))


def only(report: VerifyReport) -> Mismatch:
    """The one mismatch of a report."""
    assert not report.ok
    [mismatch] = report.mismatches
    return mismatch


def flip(folder: Path, tensor: str, at: tuple[int, int], bit: int) -> None:
    stored_array(folder, tensor)[at] ^= np.uint8(bit)


def swap_rows(folder: Path, tensor: str) -> None:
    array = stored_array(folder, tensor)
    array[[0, 1]] = array[[1, 0]]


def shift_rows(folder: Path, tensor: str) -> None:
    array = stored_array(folder, tensor)
    array[...] = np.roll(array, 1, axis=0)


def shift_columns(folder: Path, tensor: str) -> None:
    array = stored_array(folder, tensor)
    array[...] = np.roll(array, 1, axis=1)


def drop_line(folder: Path, number: int) -> None:
    edit_certificate(folder, lambda lines: lines.__delitem__(number))


# What is done to an fp8 output, the tensor that must be named, and the first coordinate that may differ.
VALUE_DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("one bit of a code", lambda f: flip(f, f"{EXPERT}.weight", (3, 5), 0x10), f"{EXPERT}.weight"),
    ("a sign", lambda f: flip(f, f"{EXPERT}.weight", (3, 5), 0x80), f"{EXPERT}.weight"),
    ("the last code", lambda f: flip(f, f"{DENSE}.weight", (-1, -1), 1), f"{DENSE}.weight"),
    ("a NaN code", lambda f: stored_array(f, f"{DENSE}.weight").__setitem__((0, 0), 0x7F), f"{DENSE}.weight"),
    ("one step of a scale", lambda f: flip(f, f"{EXPERT}.scale", (0, 0), 1), f"{EXPERT}.weight"),
    ("scales a row down", lambda f: shift_rows(f, f"{EXPERT}.scale"), f"{EXPERT}.weight"),
    ("scales a column aside", lambda f: shift_columns(f, f"{EXPERT}.scale"), f"{EXPERT}.weight"),
    ("two rows swapped", lambda f: swap_rows(f, f"{EXPERT}.weight"), f"{EXPERT}.weight"),
    ("a norm", lambda f: stored_array(f, NORM, np.uint16).__setitem__(7, 0x3F81), NORM),
    ("an expert id", lambda f: stored_array(f, TABLE, np.int64).__setitem__((2, 1), 0), TABLE),
    ("an MTP expert", lambda f: flip(f, "mtp.0.ffn.experts.0.w1.weight", (0, 9), 8), "mtp.0.ffn.experts.0.w1.weight"),
]
damages = pytest.mark.parametrize(
    ("damage", "tensor"), [row[1:] for row in VALUE_DAMAGE], ids=[r[0] for r in VALUE_DAMAGE]
)


def test_a_sound_conversion_has_no_mismatch(native: Path, sound: Path) -> None:
    for report in (by_hash(sound), by_value(sound, native)):
        assert report.ok
        assert sum(report.verdicts.values()) == len(open_checkpoint(sound).tensors)


@damages
def test_values(damage: Callable[[Path], None], tensor: str, native: Path, damaged: Path) -> None:
    damage(damaged)
    mismatch = only(by_value(damaged, native))
    assert mismatch.tensor == tensor
    before, after = decoded(native, tensor), decoded(damaged, tensor)
    differs = (before != after) | (np.signbit(before) != np.signbit(after))
    first = tuple(int(index) for index in np.argwhere(differs)[0])
    assert tuple(mismatch.details["coordinate"]) == first
    for key, value in (("expected", before[first]), ("found", after[first])):
        assert mismatch.details[key] == (float(value) if np.isfinite(value) else str(float(value)))
    json.dumps(mismatch.to_json(), allow_nan=False)


@damages
def test_hashes(damage: Callable[[Path], None], tensor: str, damaged: Path) -> None:
    damage(damaged)
    # A scale that was damaged is named itself; by value its weight is.
    assert only(by_hash(damaged)).tensor.rpartition(".")[0] == tensor.rpartition(".")[0]


def decoded(folder: Path, tensor: str) -> Array:
    """Values by the reference codec, float64."""
    from v4quant.formats.cast import Weight, scale_dtype
    from v4quant.numerics import bf16, codec

    checkpoint = open_checkpoint(folder)
    entry = checkpoint.tensors[tensor]
    if entry.dtype == "BF16":
        return bf16.decode(np.asarray(stored_array(folder, tensor, np.uint16)))
    if entry.dtype == "I64":
        return np.asarray(stored_array(folder, tensor, np.int64)).astype(np.float64)
    encoding = checkpoint.scheme.expert if ".experts." in tensor else checkpoint.scheme.dense
    scale = stored_array(folder, tensor.removesuffix("weight") + "scale", scale_dtype(encoding).type)
    weight = Weight(encoding, np.asarray(stored_array(folder, tensor)), np.asarray(scale))
    if encoding.name == "fp4":
        return codec.decode_fp4(weight.codes, weight.scales)
    finite = np.where(weight.codes & 0x7F == 0x7F, np.uint8(0), weight.codes)
    values = codec.decode_fp8(finite, weight.scales)
    return np.where(weight.codes & 0x7F == 0x7F, np.nan, values)


def rewrite_without(folder: Path, dropped: str, renamed: str = "") -> None:
    """Write a shard anew without a tensor, or with the tensor under another name; the index stays."""
    checkpoint = open_checkpoint(folder)
    file = checkpoint.tensors[dropped].file
    entries = [entry for entry in checkpoint.tensors.values() if entry.file == file]
    data = {entry.name: checkpoint.files.read(file, entry.start, entry.stop) for entry in entries}
    kept = [(renamed if e.name == dropped else e.name, e) for e in entries if e.name != dropped or renamed]
    header, placed = build_header([(name, e.dtype, e.shape) for name, e in kept], file=file)
    source = {name: e.name for name, e in kept}
    (folder / file).write_bytes(header + b"".join(data[source[entry.name]] for entry in placed))


def truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def append_space(path: Path) -> None:
    path.write_text(path.read_text() + " ")


def edit_certificate(folder: Path, edit: Callable[[list[dict[str, Any]]], None]) -> None:
    path = folder / CERTIFICATE_NAME
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    edit(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


STRUCTURAL_DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("a tensor dropped", lambda f: rewrite_without(f, NORM), NORM),
    ("a scale dropped", lambda f: rewrite_without(f, f"{DENSE}.scale"), f"{DENSE}.scale"),
    ("a tensor renamed", lambda f: rewrite_without(f, NORM, NORM.replace("q_norm", "k_norm")), NORM),
    ("a truncated shard", truncate, "model-00002-of-00004.safetensors"),
    ("a shard removed", lambda f: sorted(f.glob("*.safetensors"))[-1].unlink(), "mtp.0.enorm.weight"),
    ("another config", lambda f: append_space(f / "config.json"), "config.json"),
    ("a line removed", lambda f: drop_line(f, 5), CERTIFICATE_NAME),
    ("a line twice", lambda f: edit_certificate(f, lambda lines: lines.append(lines[1])), "embed.weight"),
    ("a false hash", lambda f: edit_certificate(f, lambda lines: lines[1].update(sha256="0" * 64)), "embed.weight"),
    ("a false shape", lambda f: edit_certificate(f, lambda lines: lines[1].update(shape=[1])), "embed.weight"),
]


@pytest.mark.parametrize(("damage", "where"), [r[1:] for r in STRUCTURAL_DAMAGE], ids=[r[0] for r in STRUCTURAL_DAMAGE])
def test_structure(damage: Callable[[Path], None], where: str, damaged: Path) -> None:
    damage(damaged)
    report = by_hash(damaged)
    assert not report.ok
    assert where in {mismatch.tensor for mismatch in report.mismatches}


def test_a_rounded_tensor_may_differ_by_what_its_certificate_says_and_no_more(native: Path, tmp_path: Path) -> None:
    bf16, rounded = tmp_path / "bf16", tmp_path / "rounded"
    convert(native, bf16, "bf16")
    stored_array(bf16, f"{EXPERT}.weight", np.uint16)[0, :8] ^= 3  # off the FP4 grid
    report = convert(bf16, rounded, "native", allow_rounding=True)
    assert [record.tensor for record in report.worst] == [f"{EXPERT}.weight"]
    verified = by_value(rounded, bf16)
    assert verified.ok
    assert sum(count for verdict, count in verified.verdicts.items() if verdict == "rounded") == 2
    flip(rounded, f"{EXPERT}.weight", (7, 0), 4)
    mismatch = only(by_value(rounded, bf16))
    assert mismatch.tensor == f"{EXPERT}.weight"
    assert "more than the certificate says" in mismatch.reason
