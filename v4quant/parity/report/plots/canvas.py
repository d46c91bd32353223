"""What all plots share: one look, a log axis that shows zeros, and SVG that stands inside a page.

Colours differ in lightness and marks in shape, so that nothing is lost in black and white.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from v4quant.parity.report.markup import Html, tag, visible

INK, QUIET, GRID, PAPER = "#1c2127", "#5b6570", "#e1e5e9", "#ffffff"
BAD = "#b3261e"
FLOOR_BAND, LIMIT_BAND, REFERENCE_BAR = "#c5ced6", "#e6ebef", "#aab4bd"
BLUE, ORANGE, GREEN = "#0b62a4", "#d98200", "#00805f"
# The page has these colours as variables, and others for them in the dark.
_VARIABLES = {
    INK: "ink",
    QUIET: "quiet",
    GRID: "grid",
    PAPER: "paper",
    BAD: "different",
    FLOOR_BAND: "within",
    LIMIT_BAND: "rest",
    REFERENCE_BAR: "bar",
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
}
WIDTH = 9.0  # inches, at 72 units each; the page scales it
_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "svg.hashsalt": "v4quant",  # ids would be random
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.4,
}
# The page sets the font, and turning by nothing is said of every text.
_LEFT_OUT = re.compile(
    r"<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>|font-family: [^;\"]*; ?| transform=\"rotate\(-0 [^\"]*\)\""
)
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def to_svg(draw: Callable[[Mapping[str, Any]], Figure], result: Mapping[str, Any], name: str, title: str) -> Html:
    """Draw a plot of the result in the common style, however matplotlib is configured.

    Args:
        name: keeps its ids apart from those of the page's other plots.
        title: what screen readers say for it.
    """
    file = io.StringIO()
    with matplotlib.style.context(["default", _STYLE]):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        draw(result).savefig(file, format="svg", transparent=True, metadata=no_metadata)
    text = file.getvalue()
    text = _LEFT_OUT.sub("", text[text.index("<svg") :])
    for reference, own in (('id="', f'id="{name}-'), ("url(#", f"url(#{name}-"), ('xlink:href="#', f'href="#{name}-')):
        text = text.replace(reference, own)
    for colour, variable in _VARIABLES.items():
        text = text.replace(f": {colour}", f": var(--{variable}, {colour})")
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    opening = f'<svg {size[0]} role="img" aria-labelledby="{name}-title">{tag("title", title, id=f"{name}-title")}'
    return Html(opening + text[text.index(">") + 1 :].strip())


def to_png(draw: Callable[[Mapping[str, Any]], Figure], result: Mapping[str, Any]) -> bytes:
    """Draw a plot of the result in the common style, as a picture for where no SVG is shown."""
    file = io.BytesIO()
    with matplotlib.style.context(["default", _STYLE]):
        draw(result).savefig(file, format="png", dpi=120, facecolor=PAPER, metadata={"Software": None})
    return file.getvalue()


def drawable(text: object) -> str:
    """Foreign text for a plot: short, and in characters that every font has."""
    plain = visible(str(text)).encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= 28 else plain[:27] + "…"


def legend(figure: Figure, handles: Iterable[Artist]) -> None:
    """One line over the plots, from the left."""
    held = list(handles)
    figure.legend(handles=held, loc="outside upper left", ncols=len(held), borderaxespad=0.2)


def _power(decade: int) -> str:
    return "10" + str(decade).translate(_SUPERSCRIPTS)


def percentage(decade: int) -> str:
    """A decade as a share: "1 %" for -2."""
    return f"{100 * 10.0**decade:.10g} %"


class LogScale:
    """A log axis that has a place for 0: a marked line under the smallest decade.

    It is a linear axis that shows log10, so that this place is ours to choose and to name.
    """

    def __init__(self, values: Iterable[float]) -> None:
        """Choose the decades.

        Args:
            values: all that is to be shown; a negative one (a divergence rounded below 0) goes with the zeros.
        """
        held = list(values)
        logs = [math.log10(value) for value in held if value > 0]
        self.has_zero = len(logs) < len(held)
        self._has_negative = any(value < 0 for value in held)
        self._only_zero = not logs
        self._low = math.floor(min(logs, default=0))
        self._high = max(math.ceil(max(logs, default=0)), self._low + 1)
        self._span = self._high - self._low
        self._zero = self._low - max(0.3, 0.13 * self._span)

    @property
    def bottom(self) -> float:
        """The lower end of the axis."""
        return (self._zero if self.has_zero else self._low) - 0.07 * self._span

    def place(self, value: float) -> float:
        """Where a value stands on the axis."""
        return math.log10(value) if value > 0 else self._zero

    def apply(self, axes: Axes, label: Callable[[int], str] = _power) -> None:
        """Set limits, ticks and grid, and draw the line of zeros if there are any.

        Args:
            label: what a decade is called.
        """
        decades = range(self._low, self._high + 1, 1 + self._span // 7)
        ticks = [] if self._only_zero else [(float(at), label(at)) for at in decades]
        if self.has_zero:
            ticks.insert(0, (self._zero, "0 or below" if self._has_negative else "exactly 0"))
            axes.axhline(self._zero, color=QUIET, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
        if not self._only_zero and decades.step == 1:
            parts = [math.log10(part) for part in range(2, 10)]
            axes.set_yticks([at + part for at in decades[:-1] for part in parts], minor=True)
        axes.set_ylim(self.bottom, self._high + 0.04 * self._span)
        axes.grid(axis="y")
        if self._only_zero and not self._has_negative:
            axes.text(0.5, 0.55, "every value is exactly 0", transform=axes.transAxes, ha="center", color=QUIET)
