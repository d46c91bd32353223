"""Weight formats: one module each, stateless; bytes in, bytes out, no I/O."""

from v4quant.errors import UsageError
from v4quant.formats import base, bf16, fp8, native
from v4quant.formats.format import Format

FORMATS: dict[str, Format] = {f.name: f for f in (native.FORMAT, fp8.FORMAT, base.FORMAT, bf16.FORMAT)}


def format_named(name: str) -> Format:
    """Look a format up.

    Raises:
        UsageError: if there is none of this name; the message lists those there are.
    """
    if name not in FORMATS:
        known = "; ".join(f"{f.name} ({f.summary})" for f in FORMATS.values())
        raise UsageError(f"--to {name!r} is no format that v4quant writes", hint=f"Known formats: {known}.")
    return FORMATS[name]


__all__ = ["FORMATS", "Format", "format_named"]
