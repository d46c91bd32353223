"""Cache bytes and their ratios: the published digits, the layouts of the kernels, and small cases counted by hand."""

import pytest

from tests.budget.configs import MILLION, released, tiny
from v4quant.budget import baselines
from v4quant.budget.kv_cache import (
    CacheLayout,
    bf16_layout,
    compressor_state_bytes,
    kv_bytes,
    kv_bytes_per_token,
    layer_bytes,
    served_layout,
    window_saving,
)
from v4quant.budget.layers import LayerKind, layers_by_kind
from v4quant.kernels.kv_layout import key_layout, kv_layout

GIB = 2**30


def test_layers_of_each_kind() -> None:
    assert layers_by_kind(released("flash")) == {"swa": 2, "csa": 21, "hca": 20}
    assert layers_by_kind(released("pro")) == {"swa": 0, "csa": 30, "hca": 31}
    assert layers_by_kind(released("pro-0813")) == layers_by_kind(released("pro")), "MTP stages are no layers"


def test_entries_are_those_of_the_kernels() -> None:
    for config, expected in ((released("flash"), CacheLayout(584, 68)), (tiny(), CacheLayout(200, 68))):
        layout = served_layout(config)
        assert layout == expected
        page = kv_layout(1, config.head_dim)
        assert layout.entry_bytes == page.data_bytes + page.scale_bytes
        key = key_layout(1, config.index_head_dim)
        assert layout.index_key_bytes == key.data_bytes + key.scale_bytes


def test_bytes_of_a_layer() -> None:
    config, layout = released("pro"), served_layout(released("pro"))
    assert layer_bytes(config, LayerKind.SWA, MILLION, layout) == 74_752
    assert layer_bytes(config, LayerKind.CSA, MILLION, layout) == 170_992_640
    assert layer_bytes(config, LayerKind.HCA, MILLION, layout) == 4_858_880
    # An entry appears when its last token is there.
    assert layer_bytes(config, LayerKind.CSA, 7, layout) == 584 + 68 + 74_752
    assert layer_bytes(config, LayerKind.CSA, 8, layout) == 2 * (584 + 68) + 74_752
    assert layer_bytes(config, LayerKind.HCA, 127, layout) == 74_752
    assert layer_bytes(config, LayerKind.HCA, 128, layout) == 584 + 74_752


@pytest.mark.parametrize(
    ("name", "total", "slope", "times", "percent", "of_gqa8"),
    [
        ("pro", 5_280_404_480, 5_031.4375, "9.545", "10.48", "2.02"),
        ("flash", 3_688_172_544, 3_514.25, "13.666", "7.32", "2.00"),
    ],
)
def test_published_ratios(name: str, total: int, slope: float, times: str, percent: str, of_gqa8: str) -> None:
    config = released(name)
    found = kv_bytes(config, MILLION, served_layout(config))
    v32, gqa8 = baselines.v32_kv_bytes(MILLION), baselines.gqa8_kv_bytes(config, MILLION)
    assert found == total
    assert kv_bytes_per_token(config, served_layout(config)) == slope
    assert (v32, baselines.v32_kv_bytes(1)) == (50_402_951_168, 48_068)
    assert gqa8 == {"pro": 244, "flash": 172}[name] * GIB
    assert f"{v32 / found:.3f}" == times
    assert f"{100 * found / v32:.2f}" == percent
    assert f"{100 * found / gqa8:.2f}" == of_gqa8


@pytest.mark.parametrize(("name", "printed"), [("pro", "9.5"), ("flash", "13.7")])
@pytest.mark.parametrize("million", [MILLION, 1_000_000])
def test_printed_digits_do_not_depend_on_the_million(name: str, printed: str, million: int) -> None:
    config = released(name)
    assert f"{baselines.v32_kv_bytes(million) / kv_bytes(config, million, served_layout(config)):.1f}" == printed


@pytest.mark.parametrize(("name", "gib", "times"), [("pro", "9.62", "8.71"), ("flash", "6.72", "12.47")])
def test_everything_in_bf16(name: str, gib: str, times: str) -> None:
    """The figures of a vLLM blog of April 2026: 83.88 and 9.62 GiB."""
    config = released(name)
    found = kv_bytes(config, MILLION, bf16_layout(config))
    v32 = baselines.v32_kv_bytes(MILLION, baselines.V32_BF16_ENTRY_BYTES, baselines.V32_BF16_INDEX_KEY_BYTES)
    assert f"{v32 / GIB:.2f}" == "83.88"
    assert f"{found / GIB:.2f}" == gib
    assert f"{v32 / found:.2f}" == times


@pytest.mark.parametrize(
    ("layout", "v32", "pro", "flash"),
    [
        (CacheLayout(576, 64), (640, 128), "9.48", "13.57"),  # no scale bytes
        (CacheLayout(584, 132), (656, 132), "8.71", "12.47"),  # FP8 index keys
        (CacheLayout(584, 68), (1152, 256), "17.06", "24.42"),  # against V3.2 in BF16
    ],
)
def test_layouts_that_are_not_the_published_one(
    layout: CacheLayout, v32: tuple[int, int], pro: str, flash: str
) -> None:
    for name, times in (("pro", pro), ("flash", flash)):
        ratio = baselines.v32_kv_bytes(MILLION, *v32) / kv_bytes(released(name), MILLION, layout)
        assert f"{ratio:.2f}" == times


@pytest.mark.parametrize(("name", "without", "with_keys"), [("pro", "7.88", "7.08"), ("flash", "7.95", "7.15")])
def test_full_length_windows(name: str, without: str, with_keys: str) -> None:
    config = released(name)
    assert f"{window_saving(config, served_layout(config), index_keys=False):.2f}" == without
    assert f"{window_saving(config, served_layout(config), index_keys=True):.2f}" == with_keys


def test_compressor_state() -> None:
    assert compressor_state_bytes(released("pro")) == 18_710_528
    assert compressor_state_bytes(released("flash")) == 12_206_080
