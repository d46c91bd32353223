"""Measured numbers as people read them.

Rounding never says more than was measured: nothing but 1 prints as 100 %, nothing but 0 as 0.
"""

NOT_APPLICABLE = "–"
_SMALL = 1e-3
_FEWER = 0.01
_MOST_DIGITS = 15


def number(value: float | None) -> str:
    """Three significant digits, below 0.001 with an exponent: "1,234", "0.120", "3.21e-4"; 0 is "0"."""
    if value is None:
        return NOT_APPLICABLE
    if isinstance(value, int) or value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    if abs(value) >= _SMALL:
        return f"{value:#.3g}".rstrip(".")
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def share(value: float | None) -> str:
    """A share of 1 as a percentage, with as many digits as keep it apart from 0 and from 100."""
    if value is None:
        return NOT_APPLICABLE
    if value in (0, 1):
        return f"{100 * value:.0f} %"
    digits = 2
    while float(f"{100 * value:.{digits}f}") in (0, 100) and digits < _MOST_DIGITS:
        digits += 1
    return f"{100 * value:.{digits}f} %"


def factor(value: float) -> str:
    """A ratio: "0.42", "12.3", "1,234"."""
    if value < _FEWER:
        return f"under {_FEWER}" if value else "0"
    if value < 100:
        return f"{value:.2f}" if value < 10 else f"{value:.1f}"
    return f"{value:,.0f}" if value < 1e9 else f"{value:.1e}"


def times(found: float, floor: float) -> str:
    """How often the floor goes into what was found: "2.10 ×", or words where the floor is 0."""
    if floor > 0:
        return f"{factor(found / floor)} ×"
    return "both 0" if found == 0 else "floor is 0"


def duration(seconds: float) -> str:
    """Seconds, or hours and minutes where they are many."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def run_lengths(values: list[int]) -> str:
    """Equal neighbours taken together: "296 + 4 × 1"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return " + ".join(f"{count} × {value:,}" if count > 1 else f"{value:,}" for value, count in runs)
