"""Every corruption is planted cleanly in every form that can have it, changes what it says, and nothing else.

What the single edits do to stored numbers is held against decoding by ml_dtypes (tests/formats/oracle.py).
"""

import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.formats import oracle
from tests.parity.selftest.copies import hashes, reduced, tensors
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.dtypes import DTYPE_BITS
from v4quant.names import parse_name
from v4quant.parity.selftest import layout, scales, settings, structure, values
from v4quant.parity.selftest.corruptions import CORRUPTIONS
from v4quant.parity.selftest.editor import Editor

FORMS = ("flash", "fp8", "bf16", "flash-base")
FP4_ONLY = {"nibbles-swapped", "fp4-code-flipped", "fp4-coarse-grid"}
OF_SCALES = {
    *("scale-lost", "scale-exponent-off", "scale-block-halved", "scale-saturated", "scale-byte-as-number", "scale-nan"),
    *("scale-transposed", "scale-rows-shifted", "scales-w1-w3-exchanged", "scales-w1-w3-larger"),
}
OF_MTP = {"mtp-lost", "mtp-lost-config-adapted", "mtp-lost-index-stale", "mtp-projections-exchanged"}
# Form -> what cannot be planted in it. The synthetic Base checkpoint has no -0 among its first experts' codes.
SKIPPED = {
    "flash": {"quantization-config-left"},
    "fp8": {*FP4_ONLY, "quantization-config-left"},
    "bf16": {*FP4_ONLY, *OF_SCALES, "scales-stored-as-numbers", "quantization-config-lost", "scale-label-lost"},
    "flash-base": {
        *FP4_ONLY,
        *("quantization-config-left", "scales-stored-as-numbers", "scale-label-lost", "negative-zeros-lost"),
    },
    "pro": {"quantization-config-left"},
    "pro-0813": {*OF_MTP, "quantization-config-left", "mtp-not-announced"},
}


@pytest.fixture(scope="module", params=[*FORMS])
def original(
    request: pytest.FixtureRequest, tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return reduced(tiny(request.param), tmp_path_factory.mktemp("original") / request.param)


@pytest.fixture(scope="module")
def before(original: Path) -> Iterator[dict[str, str]]:
    """Hashes of the original, which no corruption may change."""
    found = hashes(original)
    yield found
    assert hashes(original) == found


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_planted_in_every_form(name: str, original: Path, before: dict[str, str], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(original)
    corruption = CORRUPTIONS[name]
    why_not = corruption.applies(checkpoint)
    assert bool(why_not) == (name in SKIPPED[original.name]), why_not
    if why_not:
        return
    editor = Editor(checkpoint)
    corruption.apply(editor)
    changed = editor.finish(tmp_path / "copy")
    after = hashes(tmp_path / "copy")
    assert changed
    assert changed == sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))
    assert hashes(original) == before
    shutil.rmtree(tmp_path / "copy")  # pytest keeps folders


@pytest.mark.parametrize("kind", ["pro", "pro-0813"])
def test_what_cannot_be_planted_elsewhere(kind: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(reduced(tiny(kind), tmp_path / kind))
    assert {name for name, c in CORRUPTIONS.items() if c.applies(checkpoint)} == SKIPPED[kind]


def test_the_registry_holds_every_corruption_once() -> None:
    listed = [c.name for module in (structure, scales, values, layout, settings) for c in module.CORRUPTIONS]
    assert sorted(listed) == sorted(CORRUPTIONS)
    assert len(CORRUPTIONS) >= 32
    for name, corruption in CORRUPTIONS.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        assert corruption.what.endswith((".", ").")), name


# ---- what the edits do, in values ----------------------------------------------------------------------------------


@pytest.fixture
def codes() -> torch.Tensor:
    """Every byte of packed FP4 codes: uint8 [4, 64], which are 128 columns."""
    return torch.arange(256, dtype=torch.uint8).view(4, 64)


def fp4(stored: torch.Tensor) -> oracle.Float64:
    return oracle.decode(stored.numpy().view(np.int8), None)


def test_saturated_scales_halve_what_does_not_fit(codes: torch.Tensor) -> None:
    """Codes are doubled up to the largest; with half the scale only the largest values change."""
    assert np.array_equal(fp4(scales.twice_in_fp4(codes)), np.clip(2 * fp4(codes), -6, 6))
    stored = torch.arange(256, dtype=torch.uint8)
    expected = np.clip(2 * stored.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64), -448, 448)
    found = scales.twice_in_fp8(stored).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert np.array_equal(found, expected, equal_nan=True)


def test_scales_times_a_power_of_two() -> None:
    scale = torch.tensor([[1, 100], [127, 253]], dtype=torch.uint8)
    for exponent in (-1, 1):
        found = scales.times_power_of_two(scale, exponent).numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        assert np.array_equal(found, scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64) * 2.0**exponent)
    assert scales.times_power_of_two(torch.tensor([0, 254], dtype=torch.uint8), 1).tolist() == [1, 254]
    assert scales.times_power_of_two(torch.tensor([0, 254], dtype=torch.uint8), -1).tolist() == [0, 253]
    assert scales.times_power_of_two(torch.tensor([0.5, 3.0]), 1).tolist() == [1.0, 6.0]


def test_a_scale_byte_as_a_number() -> None:
    """120 stands for 2^-7; read as a number it is 120, in E8M0 the nearest power of two, 128."""
    assert scales.byte_as_number(torch.tensor([2.0**-7, 1.0])).tolist() == [120.0, 127.0]
    found = scales.byte_as_number(torch.tensor([120, 127, 64], dtype=torch.uint8))
    assert found.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64).tolist() == [128.0, 128.0, 64.0]


def test_swapped_nibbles_and_shifted_columns(codes: torch.Tensor) -> None:
    expected = fp4(codes)
    assert np.array_equal(fp4(values.swap_nibbles(codes)).reshape(-1, 2), expected.reshape(-1, 2)[:, ::-1])
    shifted = layout.pack(layout.unpack(codes).roll(1, 1))
    assert np.array_equal(fp4(shifted), np.roll(expected, 1, axis=1))
    assert torch.equal(layout.pack(layout.unpack(codes)), codes)


def test_the_coarse_grid(codes: torch.Tensor) -> None:
    exact, coarse = fp4(codes), fp4(values.coarsen_fp4(codes))
    assert set(np.abs(coarse).ravel()) == {0.0, 1.0, 2.0, 4.0}
    assert np.array_equal(np.signbit(coarse), np.signbit(exact))
    kept = np.isin(np.abs(exact), (0.0, 1.0, 2.0, 4.0))
    assert np.array_equal(coarse[kept], exact[kept])
    assert (np.abs(coarse[np.abs(exact) == 6]) == 4).all()


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "BF16"])
def test_lost_signs_and_negative_zeros(dtype: str, codes: torch.Tensor) -> None:
    stored = torch.arange(0, 0x7F80, 8, dtype=torch.int16) if dtype == "BF16" else codes
    if dtype == "BF16":
        stored = torch.cat([stored, stored | -0x8000]).view(torch.bfloat16).view(4, -1)

    def decoded(found: torch.Tensor) -> oracle.Float64:
        kind = {"I8": np.dtype(np.int8), "F8_E4M3": oracle.E4M3, "BF16": oracle.BF16}[dtype]
        bits = found.view(torch.int16).numpy() if dtype == "BF16" else found.numpy()
        result = oracle.decode(bits.view(kind), None)
        result[np.isnan(result)] = 1.0  # E4M3 has two NaN codes
        return result

    exact = decoded(stored)
    unsigned = decoded(values.lose_signs(stored, dtype))
    assert np.array_equal(unsigned, np.abs(exact))
    assert not np.signbit(unsigned).any()
    zeros = decoded(values.lose_negative_zeros(stored, dtype))
    assert np.array_equal(zeros, exact)
    assert not np.signbit(zeros[zeros == 0]).any()
    assert np.array_equal(np.signbit(zeros[zeros != 0]), np.signbit(exact[exact != 0]))
    assert np.signbit(exact[exact == 0]).any()


def test_ids_through_bf16() -> None:
    """With many experts it is what the cast itself does: 257 to 383 lose their odd ids, and 383 becomes 384."""
    table = torch.arange(384).view(64, 6)
    cast = table.numpy().astype(ml_dtypes.bfloat16).astype(np.int64)
    assert np.array_equal(values.ids_through_bf16(table, 512).numpy(), cast)
    assert cast.max() == 384
    small = torch.arange(8).view(2, 4)
    assert values.ids_through_bf16(small, 8).tolist() == [[0, 1, 2, 3], [4, 4, 6, 7]]


def test_a_matrix_through_fp8_is_rounded_by_blocks() -> None:
    matrix = torch.randn(130, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = values.through_fp8(matrix)
    assert found.dtype == torch.bfloat16
    for rows, columns in ((slice(0, 128), slice(0, 128)), (slice(128, 130), slice(128, 200))):
        block = matrix[rows, columns].double().numpy()
        scale = 2.0 ** math.ceil(math.log2(np.abs(block).max() / 448))
        expected = oracle.nearest(block / scale, oracle.E4M3) * scale
        assert np.array_equal(found[rows, columns].double().numpy(), expected)


# Corruption -> what the stored tensors must be to one another afterwards; all on the native form.
Check = Callable[[Callable[[str], torch.Tensor], Callable[[str], torch.Tensor]], bool]
EXPERT = "layers.0.ffn.experts"
RELATIONS: dict[str, Check] = {
    "w1-w3-exchanged": lambda was, now: all(
        torch.equal(now(f"{EXPERT}.0.{one}.{leaf}"), was(f"{EXPERT}.0.{other}.{leaf}"))
        for one, other in (("w1", "w3"), ("w3", "w1"))
        for leaf in ("weight", "scale")
    ),
    "experts-exchanged": lambda was, now: torch.equal(now(f"{EXPERT}.1.w2.scale"), was(f"{EXPERT}.0.w2.scale")),
    "experts-rotated": lambda was, now: all(
        torch.equal(now(f"{EXPERT}.{e}.w2.weight"), was(f"{EXPERT}.{(e + 1) % 6}.w2.weight")) for e in range(6)
    ),
    "expert-duplicated": lambda was, now: torch.equal(now(f"{EXPERT}.1.w3.weight"), was(f"{EXPERT}.0.w3.weight")),
    "layers-experts-exchanged": lambda was, now: torch.equal(
        now("layers.1.ffn.experts.5.w1.scale"), was(f"{EXPERT}.5.w1.scale")
    ),
    "mtp-projections-exchanged": lambda was, now: torch.equal(now("mtp.0.h_proj.scale"), was("mtp.0.e_proj.scale")),
    "head-is-embedding": lambda was, now: torch.equal(now("head.weight"), was("embed.weight")),
    "head-shifted": lambda was, now: torch.equal(now("head.weight")[1:], was("head.weight")[:-1]),
    "embedding-shifted": lambda was, now: torch.equal(now("embed.weight")[1:], was("embed.weight")[:-1]),
    "rows-swapped": lambda was, now: all(
        torch.equal(now(f"{EXPERT}.0.w2.{leaf}")[:3], was(f"{EXPERT}.0.w2.{leaf}")[[1, 0, 2]])
        for leaf in ("weight", "scale")
    ),
    "hc-comb-transposed": lambda was, now: (
        torch.equal(now("layers.0.hc_attn_base")[8:].view(4, 4), was("layers.0.hc_attn_base")[8:].view(4, 4).T)
        and torch.equal(now("layers.0.hc_attn_fn")[9], was("layers.0.hc_attn_fn")[12])
        and torch.equal(now("layers.0.hc_attn_fn")[:8], was("layers.0.hc_attn_fn")[:8])
    ),
    "compressor-windows-exchanged": lambda was, now: (
        torch.equal(now("layers.1.attn.compressor.ape")[:, :128], was("layers.1.attn.compressor.ape")[:, 128:])
        and torch.equal(
            now("layers.1.attn.compressor.wkv.weight")[:128], was("layers.1.attn.compressor.wkv.weight")[128:]
        )
    ),
    "wo-a-groups-rotated": lambda was, now: (
        torch.equal(now("layers.0.attn.wo_a.weight")[128:], was("layers.0.attn.wo_a.weight")[:128])
        and torch.equal(now("layers.0.attn.wo_a.scale")[1:], was("layers.0.attn.wo_a.scale")[:1])
    ),
    "wkv-rope-order": lambda was, now: (
        torch.equal(now("layers.0.attn.wkv.weight")[64:96], was("layers.0.attn.wkv.weight")[64::2])
        and torch.equal(now("layers.0.attn.wkv.weight")[:64], was("layers.0.attn.wkv.weight")[:64])
    ),
    "scale-transposed": lambda was, now: torch.equal(
        now("layers.0.attn.wo_a.scale"), was("layers.0.attn.wo_a.scale").T
    ),
    "scales-w1-w3-larger": lambda was, now: torch.equal(
        now(f"{EXPERT}.0.w1.scale"), torch.maximum(was(f"{EXPERT}.0.w1.scale"), was(f"{EXPERT}.0.w3.scale"))
    ),
    "hc-bf16": lambda was, now: torch.equal(now("hc_head_fn"), was("hc_head_fn").bfloat16().float()),
    "attn-sink-zero": lambda _, now: not now("layers.0.attn.attn_sink").any(),
    "tid2eid-out-of-range": lambda was, now: bool(
        ((now("layers.0.ffn.gate.tid2eid") == 6) == (was("layers.0.ffn.gate.tid2eid") == 5)).all()
    ),
}


@pytest.mark.parametrize("name", RELATIONS)
def test_values_are_where_the_corruption_says(name: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = reduced(tiny("flash"), tmp_path / "original")
    editor = Editor(open_checkpoint(folder))
    CORRUPTIONS[name].apply(editor)
    editor.finish(tmp_path / "copy")
    was, now = Editor(open_checkpoint(folder)), Editor(open_checkpoint(tmp_path / "copy"))
    assert RELATIONS[name](was.read, now.read)
    assert not RELATIONS[name](was.read, was.read)


def test_stored_names_are_v4_names_but_for_the_one_renamed(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    editor = Editor(open_checkpoint(reduced(tiny("flash"), tmp_path / "original")))
    CORRUPTIONS["tensor-renamed"].apply(editor)
    editor.finish(tmp_path / "copy")
    found = tensors(tmp_path / "copy")
    assert [name for _, name in found if parse_name(name) is None] == ["model.layers.0.self_attn.q_a_norm.weight"]
    assert all(dtype in DTYPE_BITS for dtype, _, _ in found.values())
