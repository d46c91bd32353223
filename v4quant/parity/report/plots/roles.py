"""The plot of bytes by role, before and after."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from v4quant.parity.report.figures import factor
from v4quant.parity.report.plots.canvas import BLUE, GRID, REFERENCE_BAR, WIDTH, drawable, legend
from v4quant.words import decimal_bytes

_MOST_ROLES = 12
_BAR = 0.36


def by_role(result: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Role, its bytes in the reference and in the candidate; the largest first."""
    sides = result["bytes_by_role"]
    reference, candidate = sides["reference"] or {}, sides["candidate"]  # a stored reference has no bytes
    roles = [(role, reference.get(role, 0), candidate.get(role, 0)) for role in reference | candidate]
    return sorted(roles, key=lambda role: (-max(role[1:]), role[0]))


def draw_bytes(result: Mapping[str, Any]) -> Figure:
    """Two horizontal bars a role, the reference's over the candidate's, with their sizes in words."""
    roles = by_role(result)
    if len(roles) > _MOST_ROLES:
        rest = roles[_MOST_ROLES - 1 :]
        others = (f"{len(rest)} others", sum(role[1] for role in rest), sum(role[2] for role in rest))
        roles = [*roles[: _MOST_ROLES - 1], others]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.45 * len(roles)), layout="constrained")
    axes = figure.subplots()
    largest = max((max(role[1:]) for role in roles), default=1) or 1
    for place, (_, before, after) in enumerate(roles):
        ratio = f" ({factor(after / before)} ×)" if before and after != before else ""
        for offset, size, colour, note in ((-_BAR / 2, before, REFERENCE_BAR, ""), (_BAR / 2, after, BLUE, ratio)):
            axes.barh(place + offset, size, height=_BAR, color=colour)
            words = (decimal_bytes(size) if size else "none") + note
            axes.text(size + 0.008 * largest, place + offset, words, va="center", fontsize=8.5)
    axes.set_yticks(range(len(roles)), [drawable(role[0].replace("_", " ")) for role in roles])
    axes.set_ylim(len(roles) - 0.4, -0.6)
    axes.set_xlim(0, 1.2 * largest)  # room for the words behind the longest bar
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_color(GRID)
    legend(figure, [Patch(color=REFERENCE_BAR, label="reference"), Patch(color=BLUE, label="candidate")])
    return figure
