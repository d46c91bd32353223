"""The plot of the divergence at each token: a mark a token, or one for many neighbours that keeps their extremes."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from v4quant.parity.report.figures import number
from v4quant.parity.report.plots.canvas import BAD, BLUE, INK, QUIET, WIDTH, LogScale, legend

_MOST_SINGLE = 1200  # a mark takes some 100 bytes of SVG
_MOST_BINS = 600
_MOST_BOUNDARIES = 40


@dataclass(frozen=True, slots=True)
class Bin:
    """Neighbouring tokens, and the extremes and the median of their values.

    Attributes:
        start, stop: which; the last is stop - 1.
        low, median, high: of their values.
    """

    start: int
    stop: int
    low: float
    median: float
    high: float

    @property
    def middle(self) -> float:
        """The position of its mark."""
        return (self.start + self.stop - 1) / 2


def bins_of(values: Sequence[float], lengths: Sequence[int]) -> list[Bin]:
    """A bin for each token if they are few, else of as many neighbours as it takes to have some 600 of them.

    Args:
        values: one a token.
        lengths: tokens of each prompt; no bin holds tokens of two, unless there are more prompts than bins.
    """
    size = 1 if len(values) <= _MOST_SINGLE else -(-len(values) // _MOST_BINS)
    bins: list[Bin] = []
    start = 0
    for length in lengths if len(lengths) <= _MOST_BINS else [len(values)]:
        for at in range(start, start + length, size):
            stop = min(at + size, start + length)
            held = values[at:stop]
            bins.append(Bin(at, stop, min(held), statistics.median(held), max(held)))
        start += length
    return bins


def tokens_a_mark(result: Mapping[str, Any]) -> int:
    """How many tokens the largest bin of the plot holds."""
    return max(one.stop - one.start for one in bins_of(result["logits"]["kl_by_token"], prompt_lengths(result)))


def prompt_lengths(result: Mapping[str, Any]) -> list[int]:
    """Tokens of each prompt; of all in one if the prompts are not those of the logits."""
    lengths = [len(prompt) for prompt in result["evidence"]["prompts"] if prompt]
    tokens = len(result["logits"]["kl_by_token"])
    return lengths if sum(lengths) == tokens else [tokens]


def draw_kl(result: Mapping[str, Any]) -> Figure:
    """KL by token position on a log scale, with the prompts' boundaries, the median and the floor's largest."""
    values, lengths = result["logits"]["kl_by_token"], prompt_lengths(result)
    median, floor = result["logits"]["kl"]["median"], result["noise_floor"]["kl_max"]
    bins = bins_of(values, lengths)
    zeros = [one.low for one in bins if one.low <= 0]
    scale = LogScale([*zeros, *(value for one in bins for value in (one.median, one.high)), median, floor])
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    axes = figure.subplots()
    _boundaries(axes, lengths)
    handles = _marks(axes, bins, scale)
    for value, style, colour, label in (
        (median, "solid", INK, f"median of all {number(median)}"),
        (floor, (0, (5, 3)), BAD, f"largest of the floor {number(floor)}"),
    ):
        handles.append(axes.axhline(scale.place(value), ls=style, color=colour, linewidth=1.1, label=label))
    scale.apply(axes)
    room = 0.5 + 0.005 * len(values)
    axes.set_xlim(-room, len(values) - 1 + room)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:,.0f}"))
    axes.set_xlabel("token, prompts one after the other")
    axes.set_ylabel("KL divergence (nats)")
    legend(figure, handles)
    return figure


def _marks(axes: Axes, bins: Sequence[Bin], scale: LogScale) -> list[Artist]:
    """A dot a token; or of neighbours a dot at the median, a bar from there to the largest, and a dash for zeros."""
    many = any(one.stop - one.start > 1 for one in bins)
    handles: list[Artist] = []
    if many:
        nan = float("nan")  # lifts the pen: all bars are one path
        x = [at for one in bins for at in (one.middle, one.middle, nan)]
        y = [at for one in bins for at in (scale.place(one.median), scale.place(one.high), nan)]
        handles += axes.plot(x, y, color=BLUE, linewidth=0.9, alpha=0.5, label="median to largest of neighbours")
        zeros = [one for one in bins if one.low <= 0]
        x = [at for one in zeros for at in (one.start - 0.5, one.stop - 0.5, nan)]
        axes.plot(x, [scale.place(0)] * len(x), color=BLUE, linewidth=2.4, solid_capstyle="butt")
    label = "median of neighbours" if many else "a token"
    middles, medians = [one.middle for one in bins], [scale.place(one.median) for one in bins]
    size = 1.8 if many or len(bins) > 400 else 3.2
    handles += axes.plot(middles, medians, ls="", marker="o", ms=size, mew=0, color=BLUE, label=label)
    return handles


def _boundaries(axes: Axes, lengths: Sequence[int]) -> None:
    """A line where a prompt begins, and its number where there is room; none if they would fill the plot."""
    if not 1 < len(lengths) <= _MOST_BOUNDARIES:
        return
    starts = [0, *accumulate(lengths)]
    free_from = 0.0
    for prompt, (start, stop) in enumerate(pairwise(starts), 1):
        if prompt > 1:
            axes.axvline(start - 0.5, color=QUIET, linewidth=0.8, zorder=1)
        if start >= free_from and stop - start >= 0.015 * starts[-1]:
            label = f"prompt {prompt}"
            place = ((start - 0.5), 1.0)
            axes.annotate(
                label, place, xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points", color=QUIET
            )
            free_from = start + 0.08 * starts[-1]
