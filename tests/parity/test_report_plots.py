"""What the plots show, read from the figures before they become SVG; and numbers as people read them."""

import math
import statistics

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tests.parity.results import make_result
from v4quant.parity.report import figures
from v4quant.parity.report.plots.canvas import BAD, BLUE, LogScale, drawable, percentage, to_svg
from v4quant.parity.report.plots.layers import draw_disagreement, draw_errors
from v4quant.parity.report.plots.roles import by_role, draw_bytes
from v4quant.parity.report.plots.tokens import bins_of, draw_kl, prompt_lengths


def points_of(line: Line2D) -> list[tuple[float, float]]:
    """What a line goes through."""
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def marks_of(axes: Axes) -> dict[float, float]:
    """Place -> height of the marks that stand for one layer each."""
    marks = [line for line in axes.lines if line.get_marker() in ("o", "s", "^", "D") and line.get_markersize() == 5]
    return dict(point for line in marks for point in points_of(line))


# The log axis with a place for zero.


def test_zero_stands_under_everything_else_and_has_a_name() -> None:
    scale = LogScale([0.0, 3e-5, 0.2])
    places = [scale.place(value) for value in (0.0, 3e-5, 1e-3, 0.2)]
    assert places == sorted(places)
    assert len(set(places)) == 4
    assert scale.bottom < places[0] < -5
    assert scale.place(1e-3) == -3


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1e-3, 0.5], ["10⁻³", "10⁻²", "10⁻¹", "10⁰"]),
        ([0.0, 2e-3], ["exactly 0", "10⁻³", "10⁻²"]),
        ([-1e-12, 2e-3], ["0 or below", "10⁻³", "10⁻²"]),
        ([0.0, 0.0], ["exactly 0"]),
        ([1e-12, 1.0], ["10⁻¹²", "10⁻¹⁰", "10⁻⁸", "10⁻⁶", "10⁻⁴", "10⁻²", "10⁰"]),
        ([0.01], ["10⁻²", "10⁻¹"]),
    ],
)
def test_ticks_of_the_log_axis(values: list[float], labels: list[str]) -> None:
    axes = Figure().subplots()
    LogScale(values).apply(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == labels
    low, high = axes.get_ylim()
    assert all(low <= LogScale(values).place(value) <= high for value in values)


def test_percentages_of_decades() -> None:
    assert [percentage(decade) for decade in (-5, -4, -2, 0)] == ["0.001 %", "0.01 %", "1 %", "100 %"]


# Layers.


def test_errors_stand_where_they_belong() -> None:
    result = make_result("different", layers=8)
    figure = draw_errors(result)
    for axes, key in zip(figure.axes, ("isolated_rel_err", "accumulated_rel_err"), strict=True):
        marks = marks_of(axes)
        assert sorted(marks) == list(range(8))
        for layer in result["layers"]:
            if layer[key] > 0:
                assert marks[layer["layer"]] == pytest.approx(math.log10(layer[key]))
            else:
                assert marks[layer["layer"]] < min(marks[other] for other in marks if other != layer["layer"])


def test_the_floor_and_the_limit_are_bands() -> None:
    result = make_result(layers=5)
    axes = draw_errors(result).axes[0]
    limit, floor = [patch.get_data().values for patch in axes.patches]  # type: ignore[attr-defined]
    for at, layer in enumerate(result["layers"]):
        if layer["floor"]["isolated_rel_err"]:
            assert floor[at] == pytest.approx(math.log10(layer["floor"]["isolated_rel_err"]))
        assert limit[at] == pytest.approx(math.log10(layer["limit"]["isolated_rel_err"]))


def test_a_departing_layer_is_ringed_where_it_departs_and_lined_everywhere() -> None:
    result = make_result("different", layers=8)
    upper, lower = draw_errors(result).axes
    rings = [
        [
            [x for x, _ in points_of(line)]
            for line in axes.lines
            if line.get_markeredgecolor() == BAD and line.get_marker() == "o"
        ]
        for axes in (upper, lower)
    ]
    assert rings == [[[4]], [[]]]  # only the isolated error is among the departures
    for axes in (upper, lower, *draw_disagreement(result).axes):
        lines = [line for line in axes.lines if line.get_color() == BAD and line.get_marker() != "o"]
        assert [[x for x, _ in points_of(line)] for line in lines] == [[4, 4]]


def test_disagreement_is_what_is_missing_to_one() -> None:
    result = make_result("different", layers=8)
    experts, indexer = draw_disagreement(result).axes
    marks = marks_of(experts)
    for layer in result["layers"]:
        if layer["expert_agreement"] < 1:
            assert marks[layer["layer"]] == pytest.approx(math.log10(1 - layer["expert_agreement"]))
    assert list(marks_of(indexer)) == [2, 6]  # the CSA layers
    hollow = [x for line in experts.lines if line.get_markerfacecolor() == "#ffffff" for x, _ in points_of(line)]
    assert hollow == [0, 1]  # routed by hash


def test_disagreement_stands_beside_its_floor_and_the_accumulated_one() -> None:
    result = make_result("different", layers=8)
    experts, indexer = draw_disagreement(result).axes
    bands = [axes.patches[0].get_data().values for axes in (experts, indexer)]  # type: ignore[attr-defined]
    dashes = [dict(points_of(line)) for axes in (experts, indexer) for line in axes.lines if line.get_marker() == "_"]
    for at, layer in enumerate(result["layers"]):
        floor, accumulated = layer["floor"]["expert_agreement"], layer["accumulated_routing"]["agreement"]
        assert floor == 1 or bands[0][at] == pytest.approx(math.log10(1 - floor))
        assert dashes[0][at] == pytest.approx(math.log10(1 - accumulated))
        if layer["kind"] == "csa":
            assert bands[1][at] == pytest.approx(math.log10(1 - layer["floor"]["indexer_overlap"]))
            assert dashes[1][at] == pytest.approx(math.log10(1 - layer["accumulated_indexer_overlap"]))
        else:
            assert math.isnan(bands[1][at])
            assert at not in dashes[1]


@pytest.mark.parametrize(("layers", "labels"), [(1, 1), (31, 31), (43, 22), (61, 31), (100, 20)])
def test_layers_are_labelled_as_often_as_there_is_room(layers: int, labels: int) -> None:
    axes = draw_errors(make_result(layers=layers)).axes[1]
    assert len(axes.get_xticks()) == labels
    assert len(axes.get_xticks()) + len(axes.get_xticks(minor=True)) >= layers


# Tokens.


def test_few_tokens_have_a_mark_each() -> None:
    values = [float(at) for at in range(30)]
    assert [(one.start, one.low, one.median, one.high) for one in bins_of(values, [10, 20])] == [
        (at, at, at, at) for at in range(30)
    ]


def test_bins_lose_no_token_and_no_extreme_and_hold_one_prompt_each() -> None:
    result = make_result(lengths=(9000, 7001, 2999, 1000))
    values, lengths = result["logits"]["kl_by_token"], prompt_lengths(result)
    bins = bins_of(values, lengths)
    assert [one.start for one in bins[1:]] == [one.stop for one in bins[:-1]]
    assert (bins[0].start, bins[-1].stop) == (0, 20000)
    assert len(bins) <= 600 + len(lengths)
    assert {9000, 16001, 19000} <= {one.start for one in bins}
    for one in bins:
        held = values[one.start : one.stop]
        assert (one.low, one.median, one.high) == (min(held), statistics.median(held), max(held))


def test_many_short_prompts_share_bins() -> None:
    assert len(bins_of([0.5] * 4000, [2] * 2000)) <= 601


def test_prompts_that_are_not_those_of_the_logits_are_not_drawn() -> None:
    result = make_result(lengths=(220, 80))
    assert prompt_lengths(result) == [220, 80]
    result["evidence"]["prompts"].pop()
    assert prompt_lengths(result) == [300]


def test_the_largest_divergence_is_drawn_however_many_tokens() -> None:
    result = make_result(lengths=(15000, 5000))
    result["logits"]["kl_by_token"][12345] = 7.5
    axes = draw_kl(result).axes[0]
    points = [point for line in axes.lines if line.get_color() == BLUE for point in points_of(line)]
    highest = max(y for _, y in points if not math.isnan(y))
    assert highest == pytest.approx(math.log10(7.5))
    assert 14999.5 in [points_of(line)[0][0] for line in axes.lines]  # where the second prompt begins


# Bytes.


def test_bytes_by_role() -> None:
    result = make_result()
    result["bytes_by_role"] = {"reference": {"a": 1000, "gone": 5}, "candidate": {"a": 2500, "new": 70}}
    assert by_role(result) == [("a", 1000, 2500), ("new", 0, 70), ("gone", 5, 0)]
    axes = draw_bytes(result).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1000, 2500, 0, 70, 5, 0]  # type: ignore[attr-defined]
    assert [text.get_text() for text in axes.texts] == [
        "1.00 kB",
        "2.50 kB (2.50 ×)",
        "none",
        "70 B",
        "5 B",
        "none (0 ×)",
    ]


def test_many_roles_are_summed_up_and_none_is_an_empty_plot() -> None:
    result = make_result()
    roles = {f"role {at:02}": 100 for at in range(40)}
    result["bytes_by_role"] = {"reference": roles, "candidate": roles}
    labels = [label.get_text() for label in draw_bytes(result).axes[0].get_yticklabels()]
    assert len(labels) == 12
    assert labels[-1] == "29 others"
    result["bytes_by_role"] = {"reference": {}, "candidate": {}}
    assert "<svg" in to_svg(draw_bytes, result, "bytes", "none")


def test_foreign_text_in_a_plot_is_short_and_plain() -> None:
    assert drawable("a\x1b漢$x$") == "a\\x1b\\u6f22$x$"
    assert drawable("x" * 40) == "x" * 27 + "…"


# Numbers.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.0, "0"),
        (7, "7"),
        (12345, "12,345"),
        (0.12, "0.120"),
        (12.34, "12.3"),
        (123.4, "123"),
        (1234.5, "1,234"),
        (0.001, "0.00100"),
        (0.000321, "3.21e-4"),
        (3.2e-12, "3.20e-12"),
        (-0.5, "-0.500"),
        (2.5e11, "2.5e+11"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert figures.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.5, "50.00 %"),
        (0.99999, "99.999 %"),
        (1 - 1e-9, "99.9999999 %"),
        (1e-7, "0.00001 %"),
    ],
)
def test_only_all_is_100_percent_and_only_nothing_0(value: float | None, text: str) -> None:
    assert figures.share(value) == text


@pytest.mark.parametrize(
    ("found", "floor", "text"),
    [
        (0.2, 0.1, "2.00 ×"),
        (0.0, 0.1, "0 ×"),
        (1e-9, 0.1, "under 0.01 ×"),
        (12.34, 1.0, "12.3 ×"),
        (123456.0, 1.0, "123,456 ×"),
        (0.0, 0.0, "both 0"),
        (0.1, 0.0, "floor is 0"),
    ],
)
def test_times_the_floor(found: float, floor: float, text: str) -> None:
    assert figures.times(found, floor) == text


def test_durations_and_chunks() -> None:
    assert [figures.duration(seconds) for seconds in (12.34, 119.9, 125.0, 4312.3)] == [
        "12.3 s",
        "119.9 s",
        "2 min 05 s",
        "1 h 11 min",
    ]
    assert figures.run_lengths([1296, 1, 1, 1, 5, 5]) == "1,296 + 3 × 1 + 2 × 5"
    assert figures.run_lengths([]) == ""
