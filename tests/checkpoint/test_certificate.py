"""The certificate: its lines say what a hash by hand says, and no damaged or edited line is taken for one."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import v4quant
from tests.checkpoint.conversion import convert, stored, write_small
from v4quant.checkpoint.certificate import (
    CERTIFICATE_NAME,
    CertificateHeader,
    TensorRecord,
    Verdict,
    read_certificate,
    verdict_counts,
)
from v4quant.checkpoint.files import Files
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.errors import CheckpointError

RECORD = TensorRecord(
    tensor="layers.0.ffn.experts.0.w1.weight",
    dtype="F8_E4M3",
    shape=(256, 256),
    sha256="0" * 64,
    verdict=Verdict.ROUNDED,
    sources={"layers.0.ffn.experts.0.w1.weight": "1" * 64, "layers.0.ffn.experts.0.w1.scale": "2" * 64},
    measured={"changed_share": 0.25, "max_relative_error": 0.1, "rms_relative_error": 1e-2, "sqnr_db": 40.0},
)
HEADER = CertificateHeader("0.1.0", "a" * 64, "native", "fp8", "b" * 64, 47)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a native checkpoint and what it became: native/, fp8/, bf16/."""
    root = tmp_path_factory.mktemp("certificate")
    write_small(root / "native", mtp=True)
    for target in ("fp8", "bf16"):
        convert(root / "native", root / target, target)
    return root


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / CERTIFICATE_NAME).read_text().splitlines()]


def hashes(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in stored(folder).items()}


@pytest.mark.parametrize("target", ["fp8", "bf16"])
def test_the_header_says_what_was_converted(converted: Path, target: str) -> None:
    out, source = converted / target, open_checkpoint(converted / "native")
    assert lines_of(out)[0] == {
        "certificate": 1,
        "tool_version": v4quant.__version__,
        "source_id": source.source_id(),
        "source_format": "native",
        "target": target,
        "config_sha256": hashlib.sha256((out / "config.json").read_bytes()).hexdigest(),
        "tensors": len(stored(out)),
    }


@pytest.mark.parametrize("target", ["fp8", "bf16"])
def test_every_line_says_what_a_hash_by_hand_says(converted: Path, target: str) -> None:
    tensors, source_hashes, out_hashes = (
        stored(converted / target),
        hashes(converted / "native"),
        hashes(converted / target),
    )
    records = lines_of(converted / target)[1:]
    index = json.loads((converted / target / "model.safetensors.index.json").read_text())["weight_map"]
    assert [record["tensor"] for record in records] == list(open_checkpoint(converted / target).tensors)
    assert {record["tensor"] for record in records} == index.keys()
    for record in records:
        name, sources = record["tensor"], record["sources"]
        weight = f"{name.removesuffix('scale')}weight" if name.endswith(".scale") else name
        scale = f"{weight.removesuffix('weight')}scale"
        expected = [name]
        if scale in source_hashes and weight.endswith(".weight"):
            cast = record["verdict"] == "value_exact"
            # What was cast depends on codes and scales both, what was copied on itself alone.
            expected = [weight, scale] if cast else [name]
        assert sources == {source: source_hashes[source] for source in expected}
        assert record["sha256"] == out_hashes[name]
        assert record["shape"] == list(tensors[name].shape)
        assert record["verdict"] == ("bit_identical" if source_hashes.get(name) == out_hashes[name] else "value_exact")


def test_value_exact_lines_say_what_the_proof_rests_on(converted: Path) -> None:
    """FP4 -> FP8: the worst spread of scales in a 128x128 block, counted here from the source's scales."""
    native = stored(converted / "native")
    for record in lines_of(converted / "fp8")[1:]:
        name = record["tensor"]
        if record["verdict"] != "value_exact":
            assert "measured" not in record
            continue
        module = name.rpartition(".")[0]
        byte = native[f"{module}.scale"].view(np.uint8).astype(int)
        codes = native[f"{module}.weight"].view(np.uint8) & 0x77
        used: npt.NDArray[np.bool_] = codes.reshape(*byte.shape, 16).max(axis=-1) > 0
        worst = 0
        for row in range(0, byte.shape[0], 128):
            for column in range(0, byte.shape[1], 4):
                block = np.s_[row : row + 128, column : column + 4]
                if used[block].any():
                    worst = max(worst, int(np.ptp(byte[block][used[block]])))
        assert record["measured"] == {"negative_zeros_lost": 0, "worst_spread_log2": worst, "spread_bound_log2": 14}
        assert 0 < worst <= 14
    assert all(
        r.get("measured", {"negative_zeros_lost": 0}) == {"negative_zeros_lost": 0}
        for r in lines_of(converted / "bf16")
    )


def test_it_holds_no_time_and_no_path(converted: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write_small(elsewhere / "source", mtp=True)
    convert(elsewhere / "source", elsewhere / "out", "fp8")
    assert (elsewhere / "out" / CERTIFICATE_NAME).read_bytes() == (converted / "fp8" / CERTIFICATE_NAME).read_bytes()


def test_lines_survive_being_written_and_read() -> None:
    for record in (RECORD, replace(RECORD, shape=(), measured={}, verdict=Verdict.BIT_IDENTICAL)):
        text = json.dumps(record.to_json())
        assert TensorRecord.from_json(json.loads(text), "here") == record
        assert ("measured" in json.loads(text)) == bool(record.measured)
    assert CertificateHeader.from_json(json.loads(json.dumps(HEADER.to_json())), "here") == HEADER


def test_describe_error_is_one_line_for_people() -> None:
    text = RECORD.describe_error()
    assert text == (
        "layers.0.ffn.experts.0.w1.weight: 25 % of values change, relative error at most 0.1, RMS 0.01, SQNR 40.0 dB"
    )


def test_verdict_counts_name_all_verdicts() -> None:
    assert verdict_counts({Verdict.ROUNDED: 3}) == {"bit_identical": 0, "value_exact": 0, "rounded": 3}


BAD_VALUES: list[tuple[str, Any]] = [
    ("tensor", 5),
    ("tensor", None),
    ("dtype", ["BF16"]),
    ("shape", "256"),
    ("shape", [256, "256"]),
    ("shape", [256.0]),
    ("shape", [True]),
    ("shape", None),
    ("sha256", 0),
    ("verdict", "exact"),
    ("verdict", 1),
    ("sources", ["a"]),
    ("sources", {"a": 1}),
    ("measured", [1]),
    ("measured", {"sqnr_db": "40"}),
    ("measured", {"sqnr_db": None}),
    ("measured", {"sqnr_db": True}),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_a_record_with_a_wrong_value_is_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"^here: not a line that v4quant writes") as caught:
        TensorRecord.from_json(RECORD.to_json() | {key: value}, "here")
    assert caught.value.hint


@pytest.mark.parametrize("key", ["tensor", "dtype", "shape", "sha256", "verdict", "sources"])
def test_a_record_without_a_key_is_refused(key: str) -> None:
    line = RECORD.to_json()
    del line[key]
    with pytest.raises(CheckpointError, match=key):
        TensorRecord.from_json(line, "here")


@pytest.mark.parametrize("line", [None, [], "x", 1, True])
def test_what_is_no_object_is_refused(line: object) -> None:
    with pytest.raises(CheckpointError):
        TensorRecord.from_json(line, "here")
    with pytest.raises(CheckpointError):
        CertificateHeader.from_json(line, "here")


@pytest.mark.parametrize(
    "change",
    [
        {"certificate": 2},
        {"certificate": None},
        {"tensors": "47"},
        {"tensors": True},
        {"target": 8},
        {"source_id": None},
        {"more": 1},
    ],
)
def test_a_header_with_a_wrong_value_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"^here: expected"):
        CertificateHeader.from_json(HEADER.to_json() | change, "here")


@pytest.mark.parametrize("key", HEADER.to_json())
def test_a_header_without_a_key_is_refused(key: str) -> None:
    line = HEADER.to_json()
    del line[key]
    with pytest.raises(CheckpointError):
        CertificateHeader.from_json(line, "here")


def read(folder: Path) -> list[TensorRecord]:
    return list(read_certificate(Files(folder))[1])


def write(folder: Path, lines: list[bytes]) -> None:
    (folder / CERTIFICATE_NAME).write_bytes(b"\n".join(lines) + b"\n")


GOOD = [json.dumps(line).encode() for line in (HEADER.to_json(), RECORD.to_json(), RECORD.to_json())]
DAMAGE: dict[str, Callable[[], list[bytes]]] = {
    "line 1": lambda: [b"", *GOOD[1:]],
    "line 2": lambda: [GOOD[0], GOOD[1][:40], GOOD[2]],
    "line 3": lambda: [*GOOD[:2], b"\xff\xfe"],
    "line 3: not JSON": lambda: [*GOOD[:2], b"[" * 100_000],
    "line 2: not JSON": lambda: [GOOD[0], b"1" * 5_000, GOOD[2]],
    "line 4": lambda: [*GOOD, b"", GOOD[2]],
    "line 2: not": lambda: [GOOD[0], b'{"a": "' + b"x" * 2_500_000],  # longer than is read at a time
}


@pytest.mark.parametrize("says", DAMAGE)
def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path, says: str) -> None:
    write(tmp_path, DAMAGE[says]())
    with pytest.raises(CheckpointError, match=f"{CERTIFICATE_NAME} {says}"):
        read(tmp_path)


def test_an_empty_or_missing_certificate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no {CERTIFICATE_NAME}") as caught:
        read(tmp_path)
    assert "--against" in caught.value.hint
    (tmp_path / CERTIFICATE_NAME).touch()
    with pytest.raises(CheckpointError, match="line 1"):
        read(tmp_path)


def test_a_long_certificate_is_read_in_pieces(tmp_path: Path) -> None:
    """Lines that cross the megabyte read at a time are whole; a missing last newline does no harm."""
    records = [replace(RECORD, tensor=f"layers.{number}.ffn.experts.0.w1.weight") for number in range(6_000)]
    write(tmp_path, [GOOD[0], *(json.dumps(record.to_json()).encode() for record in records)])
    path = tmp_path / CERTIFICATE_NAME
    assert path.stat().st_size > 2 * 2**20
    assert read(tmp_path) == records
    path.write_bytes(path.read_bytes()[:-1])
    assert read(tmp_path) == records
