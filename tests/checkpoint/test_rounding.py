"""Conversions that lose bits: refused unless allowed, found value by value, and measured as numpy measures them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.checkpoint.conversion import convert, edit, stored, write_small
from tests.formats import oracle
from v4quant.checkpoint.certificate import CERTIFICATE_NAME, Verdict
from v4quant.checkpoint.reader import JOURNAL_NAME, open_checkpoint
from v4quant.checkpoint.verify import verify_hashes, verify_values
from v4quant.cli.main import main
from v4quant.errors import CheckFailedError, CheckpointError
from v4quant.testing.asserts import assert_same_checkpoint

Bytes = npt.NDArray[np.uint8]
EXPERT = "layers.0.ffn.experts.0.w1"
DENSE = "layers.0.attn.wq_a"


def records_of(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / CERTIFICATE_NAME).read_text().splitlines()[1:]
    return {record["tensor"]: record for record in map(json.loads, lines)}


def decoded(folder: Path, weight: str) -> oracle.Float64:
    tensors = stored(folder)
    return oracle.decode(tensors[f"{weight}.weight"], tensors.get(f"{weight}.scale"))


def noise(deviation: float, share: float = 1.0) -> Callable[[Bytes], None]:
    """Give some BF16 values a relative error of this deviation."""

    def change(rows: Bytes) -> None:
        random = np.random.default_rng(round(1e6 * deviation))
        values = rows.view(oracle.BF16)
        hit = random.random(values.shape) < share
        noisy = values.astype(np.float64) * (1 + deviation * random.standard_normal(values.shape))
        values[hit] = noisy[hit].astype(oracle.BF16)

    return change


NOISY = {
    f"layers.0.ffn.experts.{e}.{w}": 0.01 * (2 * w_number + e + 1)
    for e in (0, 1)
    for w_number, w in enumerate(("w1", "w2", "w3"))
}


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 checkpoint as training leaves it: all six expert matrices and a dense one off every grid."""
    root = tmp_path_factory.mktemp("noisy")
    convert(write_small(root / "native"), root / "bf16", "bf16")
    for weight, deviation in NOISY.items():
        edit(root / "bf16", f"{weight}.weight", noise(deviation))
    edit(root / "bf16", f"{DENSE}.weight", noise(0.001, share=0.01))
    return root / "bf16"


@pytest.mark.parametrize("target", ["native", "fp8", "base"])
def test_refused_naming_the_worst(noisy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(noisy), str(out), "--to", target]) == 1
    errors = capsys.readouterr().err
    assert f"7 weights of model-00002-of-00003.safetensors would lose bits as {target}" in errors
    assert "--allow-rounding" in errors
    named = [line.split(":")[0].strip() for line in errors.splitlines() if line.startswith("  ")]
    rms = {
        w: oracle.rounding_error(*after_rounding(noisy, tmp_path / "allowed", target, w))["rms_relative_error"]
        for w in NOISY
    }
    assert named == [f"{weight}.weight" for weight in sorted(rms, key=lambda w: -rms[w])[:5]]
    assert_nothing_looks_whole(out)


def after_rounding(source: Path, out: Path, target: str, weight: str) -> tuple[oracle.Float64, oracle.Float64]:
    """Values of a weight after and before a conversion that may round."""
    if not out.exists():
        convert(source, out, target, allow_rounding=True)
    return decoded(out, weight), decoded(source, weight)


def assert_nothing_looks_whole(out: Path) -> None:
    """No config, no index, no half-written file, nothing that opens; what is finished is in the journal."""
    assert not (out / "config.json").exists()
    assert not (out / "model.safetensors.index.json").exists()
    assert not list(out.rglob("*.partial"))
    journal = (out / JOURNAL_NAME).read_text()
    for path in out.glob("*.safetensors"):
        assert f'{{"finished": "{path.name}"}}' in journal
    with pytest.raises(CheckpointError, match="unfinished conversion"):
        open_checkpoint(out)


@pytest.mark.parametrize("target", ["native", "fp8", "base"])
def test_a_refused_run_continues_when_rounding_is_allowed(noisy: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(CheckFailedError):
        convert(noisy, tmp_path / "continued", target)
    report = convert(noisy, tmp_path / "continued", target, allow_rounding=True)
    assert report.resumed_shards == 1
    assert convert(noisy, tmp_path / "at once", target, allow_rounding=True).resumed_shards == 0
    assert_same_checkpoint(tmp_path / "continued", tmp_path / "at once")


@pytest.mark.parametrize("target", ["native", "fp8", "base"])
def test_measured_as_numpy_measures(noisy: Path, tmp_path: Path, target: str) -> None:
    report = convert(noisy, tmp_path, target, allow_rounding=True)
    records = records_of(tmp_path)
    rounded = {
        name.removesuffix(".weight")
        for name, r in records.items()
        if r["verdict"] == "rounded" and name.endswith(".weight")
    }
    assert rounded == {*NOISY, DENSE}
    for weight in rounded:
        expected = oracle.rounding_error(decoded(tmp_path, weight), decoded(noisy, weight))
        measured = records[f"{weight}.weight"]["measured"]
        assert records[f"{weight}.scale"]["measured"] == measured
        assert measured["changed_share"] == expected["changed_share"]
        assert measured["negative_zeros_lost"] == 0
        for key, value in expected.items():
            assert measured[key] == pytest.approx(value, rel=1e-9), (weight, key)
    assert 0 < records[f"{DENSE}.weight"]["measured"]["changed_share"] < 0.01
    worst = [record.tensor for record in report.worst]
    assert len(worst) == 5
    assert worst == sorted(worst, key=lambda name: -records[name]["measured"]["rms_relative_error"])


@pytest.mark.parametrize("target", ["native", "fp8", "base"])
def test_rounding_is_to_the_nearest_under_the_least_scale_that_fits(noisy: Path, tmp_path: Path, target: str) -> None:
    convert(noisy, tmp_path, target, allow_rounding=True)
    tensors = stored(tmp_path)
    for weight in (EXPERT, DENSE):
        source, codes, scale = decoded(noisy, weight), tensors[f"{weight}.weight"], tensors[f"{weight}.scale"]
        unit = oracle.spread(scale, codes.dtype, source.shape)
        grid = oracle.E2M1 if codes.dtype == np.int8 else oracle.E4M3
        largest = 6 if codes.dtype == np.int8 else 448
        expected = oracle.nearest(source / unit, grid) * unit
        assert not oracle.differs(oracle.decode(codes, scale), expected).any()
        assert np.all(np.abs(source) <= largest * unit)
        rows, columns = (1, 32) if codes.dtype == np.int8 else (128, 128)
        blocks = np.abs(source).reshape(source.shape[0] // rows, rows, source.shape[1] // columns, columns)
        peak = blocks.max(axis=(1, 3))
        used = peak > 0
        assert np.all(peak[used] * 2 > largest * scale.astype(np.float64)[used])


@pytest.mark.parametrize("target", ["native", "fp8"])
def test_a_rounded_output_verifies_within_its_certificate(noisy: Path, tmp_path: Path, target: str) -> None:
    convert(noisy, tmp_path, target, allow_rounding=True)
    out, source = open_checkpoint(tmp_path), open_checkpoint(noisy)
    for report in (verify_hashes(out), verify_values(out, source)):
        assert report.ok, report.mismatches
        assert report.verdicts[Verdict.ROUNDED] == 14


def test_one_value_off_the_grid_is_enough(tmp_path: Path) -> None:
    """The least change of one BF16 value of 65,536 is found, on every way from BF16 to a smaller format."""
    convert(write_small(tmp_path / "native"), tmp_path / "bf16", "bf16")

    def change(rows: Bytes) -> None:
        values = rows.view(np.uint16)
        values[200, 100] = 0x3C01  # 0.00787: a mantissa that no FP8 or FP4 number has

    edit(tmp_path / "bf16", f"{EXPERT}.weight", change)
    for target in ("native", "fp8", "base"):
        with pytest.raises(CheckFailedError, match=rf"1 weights of .*\n  {EXPERT}\.weight: 0\.00153 % of values"):
            convert(tmp_path / "bf16", tmp_path / "to" / target, target)


@pytest.mark.parametrize("target", ["fp8", "bf16", "base"])
def test_fp8_weights_that_are_no_fp4_numbers_are_refused_as_native(tmp_path: Path, target: str) -> None:
    """The Base releases' experts are FP8 from birth, whatever they are stored as since."""
    folder = write_small(tmp_path / "base", "flash-base")
    if target != "base":
        convert(folder, tmp_path / target, target)
        folder = tmp_path / target
    with pytest.raises(CheckFailedError, match=r"6 weights of .* as native"):
        convert(folder, tmp_path / "native", "native")
    convert(folder, tmp_path / "native", "native", allow_rounding=True)
    expected = oracle.rounding_error(decoded(tmp_path / "native", EXPERT), decoded(folder, EXPERT))
    measured = records_of(tmp_path / "native")[f"{EXPERT}.weight"]["measured"]
    assert {key: pytest.approx(measured[key], rel=1e-9) for key in expected} == expected


def far_group(spread: int, code: int) -> tuple[Callable[[Bytes], None], Callable[[Bytes], None]]:
    """One group of 32 equal codes whose scale lies far below that of its block: changes of codes and of scales."""

    def codes(rows: Bytes) -> None:
        rows[:128, :64] = 0x77  # 6.0 everywhere in the first 128x128 block
        rows[5, 16:32] = code * 0x11

    def scales(rows: Bytes) -> None:
        rows[:128, :4] = 130
        rows[5, 1] = 130 - spread

    return codes, scales


@pytest.mark.parametrize(
    ("spread", "code", "exact"),
    [
        (14, 1, True),
        (15, 1, False),  # 0.5 x 2^-9 lies between two E4M3 numbers
        (15, 3, False),
        (15, 2, True),
        (16, 2, False),
        (16, 10, False),
        (16, 12, True),
        (20, 8, True),  # -0 has no exponent
    ],
)
def test_fp4_scales_that_spread_far_within_a_block(tmp_path: Path, spread: int, code: int, exact: bool) -> None:
    source = write_small(tmp_path / "native")
    codes, scales = far_group(spread, code)
    edit(source, f"{EXPERT}.weight", codes)
    edit(source, f"{EXPERT}.scale", scales)
    if exact:
        convert(source, tmp_path / "fp8", "fp8")
        record = records_of(tmp_path / "fp8")[f"{EXPERT}.weight"]
        assert record["verdict"] == "value_exact"
        assert record["measured"]["worst_spread_log2"] == max(spread if code != 8 else 0, 6)
    else:
        with pytest.raises(CheckFailedError, match=rf"1 weights of .*\n  {EXPERT}\.weight"):
            convert(source, tmp_path / "fp8", "fp8")
        convert(source, tmp_path / "fp8", "fp8", allow_rounding=True)
        record = records_of(tmp_path / "fp8")[f"{EXPERT}.weight"]
        assert record["verdict"] == "rounded"
        assert record["measured"]["worst_spread_log2"] == spread
        assert record["measured"]["changed_share"] == 32 / 65_536
    wrong = oracle.differs(decoded(tmp_path / "fp8", EXPERT), decoded(source, EXPERT))
    assert np.count_nonzero(wrong) == (0 if exact else 32)
    assert exact or wrong[5, 32:64].all()


@pytest.mark.parametrize("target", ["fp8", "bf16"])
def test_an_f32_scale_that_is_no_power_of_two(tmp_path: Path, target: str) -> None:
    source = write_small(tmp_path / "base", "flash-base")

    def change(rows: Bytes) -> None:
        rows.view(np.float32)[0, 1] = 0.0123

    edit(source, f"{DENSE}.scale", change)
    with pytest.raises(CheckFailedError, match=rf"1 weights of .*\n  {DENSE}\.weight"):
        convert(source, tmp_path / "out", target)
    convert(source, tmp_path / "out", target, allow_rounding=True)
    measured = records_of(tmp_path / "out")[f"{DENSE}.weight"]["measured"]
    expected = oracle.rounding_error(decoded(tmp_path / "out", DENSE), decoded(source, DENSE))
    assert {key: pytest.approx(measured[key], rel=1e-9) for key in expected} == expected
    assert verify_values(open_checkpoint(tmp_path / "out"), open_checkpoint(source)).ok
    convert(source, tmp_path / "copy", "base")
    assert records_of(tmp_path / "copy")[f"{DENSE}.scale"]["verdict"] == "bit_identical"


@pytest.mark.parametrize(("byte", "exact"), [(252, True), (253, False), (254, False)])
def test_scales_beyond_bf16(tmp_path: Path, byte: int, exact: bool) -> None:
    """6 x 2^126 is more than BF16 holds: counted and refused, never an infinity."""
    source = write_small(tmp_path / "native")

    def change(rows: Bytes) -> None:
        rows[77, 3] = byte

    edit(source, f"{EXPERT}.scale", change)
    if exact:
        convert(source, tmp_path / "out", "bf16")
    else:
        with pytest.raises(CheckFailedError, match=EXPERT):
            convert(source, tmp_path / "out", "bf16")
        convert(source, tmp_path / "out", "bf16", allow_rounding=True)
    assert np.isfinite(decoded(tmp_path / "out", EXPERT)).all()
    assert (records_of(tmp_path / "out")[f"{EXPERT}.weight"]["verdict"] == "value_exact") == exact
