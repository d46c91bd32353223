"""Counts, sizes and foreign text as people read them, on a terminal and in a report."""


def escaped(text: str) -> str:
    """Make control characters visible, so that a hostile tensor or file name cannot steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def decimal_bytes(count: int) -> str:
    """Write a byte count as people do: decimal units, three significant digits or more."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def plural(count: int, noun: str) -> str:
    """Write "1 tensor", "2 tensors", "3 mismatches"."""
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{ending}"
