"""Plots with one place a layer: relative errors, and disagreement on experts and on the indexer's picks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from v4quant.parity.report.plots.canvas import (
    BAD,
    BLUE,
    FLOOR_BAND,
    GREEN,
    LIMIT_BAND,
    ORANGE,
    PAPER,
    QUIET,
    WIDTH,
    LogScale,
    legend,
    percentage,
)

# Mark, colour and name of each kind of layer, and of a kind that is none of them.
_KINDS = {"window": ("o", BLUE, "window"), "csa": ("s", ORANGE, "CSA"), "hca": ("^", GREEN, "HCA")}
_OTHER_KIND = ("D", QUIET, "other")
_ERRORS = {
    "isolated_rel_err": "isolated: both fed the reference's input",
    "accumulated_rel_err": "accumulated: each fed its own",
}
_AGREEMENTS = {"expert_agreement": "routed experts", "indexer_overlap": "indexer picks"}
_LABELS = 31  # of layers, in one plot
_NAMED = 3  # departing layers, in the legend
_DEPARTURE: dict[str, Any] = {"color": BAD, "linewidth": 0.9, "linestyle": (0, (3, 3))}
_DASH: dict[str, Any] = {"ls": "", "marker": "_", "ms": 8, "mew": 1.4, "color": QUIET}
_RING: dict[str, Any] = {
    "marker": "o",
    "markersize": 10,
    "markerfacecolor": "none",
    "markeredgecolor": BAD,
    "markeredgewidth": 1.4,
}

Layer = Mapping[str, Any]


def draw_errors(result: Mapping[str, Any]) -> Figure:
    """Relative error by layer, isolated over accumulated, on one log scale; the floor and the limit as bands."""
    layers = result["layers"]
    scale = LogScale(
        value for layer in layers for key in _ERRORS for value in (layer[key], layer["limit"][key], layer["floor"][key])
    )
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    beyond = {(found["figure"], found["where"]) for found in result["departures"]}
    for axes, (key, title) in zip(figure.subplots(2, 1, sharex=True), _ERRORS.items(), strict=True):
        for band, colour in (("limit", LIMIT_BAND), ("floor", FLOOR_BAND)):
            tops = [scale.place(layer[band][key]) for layer in layers]
            _band(axes, layers, tops, scale.bottom, colour)
        _marks(axes, layers, [scale.place(layer[key]) for layer in layers])
        ringed = [layer for layer in layers if (key, f"layer {layer['layer']}") in beyond]
        axes.plot([layer["layer"] for layer in ringed], [scale.place(layer[key]) for layer in ringed], ls="", **_RING)
        scale.apply(axes)
        axes.set_ylabel("relative error")
        _finish(axes, layers, title)
    figure.axes[0].set_xlabel("")
    bands = [Patch(color=FLOOR_BAND, label="floor"), Patch(color=LIMIT_BAND, label="up to the limit")]
    legend(figure, [*_kinds(layers), *bands, *_departure(layers)])
    return figure


def draw_disagreement(result: Mapping[str, Any]) -> Figure:
    """Share of routed experts, and of the indexer's picks where there is an indexer, that only one chose, by layer."""
    layers = result["layers"]
    panels = [key for key in _AGREEMENTS if any(layer[key] is not None for layer in layers)]
    figure = Figure(figsize=(WIDTH, 0.8 + 2.1 * len(panels)), layout="constrained")
    for axes, key in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True):
        having = [layer for layer in layers if layer[key] is not None]
        numbers = [layer["layer"] for layer in having]
        isolated = [1 - layer[key] for layer in having]
        accumulated = [_lost(_accumulated(layer, key)) for layer in having]
        floors = [_lost(layer["floor"][key]) for layer in having]
        scale = LogScale([*isolated, *accumulated, *floors])
        tops = [math.nan if layer[key] is None else scale.place(_lost(layer["floor"][key])) for layer in layers]
        _band(axes, layers, tops, scale.bottom, FLOOR_BAND)
        axes.plot(numbers, [scale.place(share) for share in accumulated], **_DASH)
        hollow = key == "expert_agreement"
        _marks(axes, having, [scale.place(share) for share in isolated], hollow_if_hashed=hollow)
        scale.apply(axes, percentage)
        axes.set_ylabel("chosen by one only")
        _finish(axes, layers, _AGREEMENTS[key])
        axes.set_xlabel("layer" if key == panels[-1] else "")
    by_hash = Line2D([], [], ls="", marker="o", mfc=PAPER, mec=QUIET, label="experts fixed by token id")
    hashed = [by_hash] if any(layer["routing"] == "hash" for layer in layers) else []
    others = [Line2D([], [], label="accumulated", **_DASH), Patch(color=FLOOR_BAND, label="floor")]
    legend(figure, [*_kinds(layers), *hashed, *others, *_departure(layers)])
    return figure


def _band(axes: Axes, layers: Sequence[Layer], tops: Sequence[float], bottom: float, colour: str) -> None:
    """Fill up to a line that steps from layer to layer; nothing where it is NaN."""
    edges = [layer["layer"] - 0.5 for layer in layers]
    axes.stairs(tops, [*edges, edges[-1] + 1], baseline=bottom, fill=True, color=colour, linewidth=0, zorder=0.5)


def _marks(axes: Axes, layers: Sequence[Layer], heights: Sequence[float], *, hollow_if_hashed: bool = False) -> None:
    """A mark a layer, in the form and colour of its kind.

    Args:
        hollow_if_hashed: True leaves those of hash-routed layers hollow.
    """
    axes.plot([layer["layer"] for layer in layers], heights, color=QUIET, linewidth=0.6, alpha=0.6, zorder=1.8)
    alike: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for layer, height in zip(layers, heights, strict=True):
        mark, colour, _ = _KINDS.get(layer["kind"], _OTHER_KIND)
        face = PAPER if hollow_if_hashed and layer["routing"] == "hash" else colour
        alike.setdefault((mark, colour, face), []).append((layer["layer"], height))
    for (mark, colour, face), points in alike.items():
        axes.plot(*zip(*points, strict=True), ls="", marker=mark, ms=5, mfc=face, mec=colour, clip_on=False)


def _finish(axes: Axes, layers: Sequence[Layer], title: str) -> None:
    """Title, axis of layers, and a line where a layer departs."""
    axes.set_title(title)
    departing = [layer["layer"] for layer in layers if layer["departs"]]
    for layer in departing:
        axes.axvline(layer, zorder=1, **_DEPARTURE)
    numbers = [layer["layer"] for layer in layers]
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    step = next((step for step in steps if len(numbers) / step <= _LABELS), 1000)
    axes.set_xticks([number for number in numbers if number % step == 0])
    axes.set_xticks(numbers, minor=True)
    axes.set_xlim(numbers[0] - 0.7, numbers[-1] + 0.7)
    axes.set_xlabel("layer")


def _accumulated(layer: Layer, key: str) -> float | None:
    share: float | None = (
        layer["accumulated_routing"]["agreement"] if key == "expert_agreement" else layer[f"accumulated_{key}"]
    )
    return share


def _lost(share: float | None) -> float:
    """What is missing to full agreement; nothing where nothing was measured."""
    return 0.0 if share is None else 1 - share


def _kinds(layers: Iterable[Layer]) -> list[Artist]:
    """Legend entries of the kinds that are there."""
    present = {_KINDS.get(layer["kind"], _OTHER_KIND) for layer in layers}
    return [
        Line2D([], [], ls="", marker=mark, ms=5, color=colour, label=name)
        for mark, colour, name in (*_KINDS.values(), _OTHER_KIND)
        if (mark, colour, name) in present
    ]


def _departure(layers: Iterable[Layer]) -> list[Artist]:
    """The legend entry of the departing layers, if there are any."""
    departing = [layer["layer"] for layer in layers if layer["departs"]]
    if not departing:
        return []
    named = ", ".join(map(str, departing[:_NAMED]))
    rest = f" and {len(departing) - _NAMED} more" if len(departing) > _NAMED else ""
    label = f"layer {named} departs" if len(departing) == 1 else f"layers {named}{rest} depart"
    return [Line2D([], [], label=label, **_DEPARTURE)]
