"""What `convert` has to do with the Hub: which commit its source is at, and where finished shards go."""

from pathlib import Path
from typing import TYPE_CHECKING

from v4quant.errors import UsageError
from v4quant.hub.location import parse_location, require_repo_id

if TYPE_CHECKING:
    from v4quant.checkpoint.plan import Plan
    from v4quant.hub.stream import HubRun


def pinned_source(text: str, out: Path) -> str:
    """The source, at the commit that an unfinished run in `out` began with."""
    location = parse_location(text)
    if location is None:
        return text
    from v4quant.hub.stream import pinned

    return str(pinned(location, out))


def begin_hub_run(plan: "Plan", out: Path, source: str, push: str | None, *, private: bool) -> "HubRun | None":
    """The conversion as one that has to do with the Hub; None where all of it is local.

    Raises:
        UsageError: if --private is given without --push, or --push is no repository.
    """
    if private and push is None:
        raise UsageError("--private is given without --push", hint="v4quant push has a --private of its own.")
    if push is not None:
        require_repo_id(push)
    location = parse_location(source)
    if location is None and push is None:
        return None
    from v4quant.hub.stream import HubRun

    return HubRun(plan, out, location, push, private=private)


def note_origin(source: Path, out: Path) -> None:
    """Note in an output folder which repository its local source was downloaded from, where that is known.

    Raises:
        OutputError: if the disk refuses.
    """
    from v4quant.hub.origin import downloaded_from, note_source

    origin = downloaded_from(source)
    if origin is not None:
        note_source(out, origin)
