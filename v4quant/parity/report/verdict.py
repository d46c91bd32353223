"""The top of the page: the verdict in words, why, the figures that decide, and what to know before trusting it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from v4quant.parity.report.figures import number, share, times
from v4quant.parity.report.markup import Html, join, tag
from v4quant.words import plural

# Verdict -> sign and word; each sign means what the word says, so colour is not needed.
_VERDICTS = {
    "identical": ("=", "Identical"),
    "indistinguishable": ("≈", "Indistinguishable"),
    "different": ("≠", "Different"),
}
_GAUGE_END = 1.3  # of the limit, where the scale of a gauge ends


@dataclass(frozen=True, slots=True)
class _Figure:
    """A figure beside its floor; `distance` and `floor` are 0 where nothing differs."""

    title: str
    shown: str
    distance: float
    floor: float
    floor_shown: str


def verdict_part(result: Mapping[str, Any]) -> Html:
    """Heading, verdict, deciding figures, caveats."""
    sign, word = _VERDICTS[result["verdict"]]
    banner = tag(
        "div",
        tag("div", sign, class_="sign", aria_hidden="true"),
        tag("div", tag("p", word, class_="word"), tag("p", result["in_words"], class_="why")),
        class_=f"verdict {result['verdict']}",
        role="status",
    )
    margin = result["noise_floor"]["margin"]
    cards = tag("div", *(_card(figure, margin) for figure in _deciding(result)), class_="cards")
    return join([_heading(result), banner, cards, _about_the_floor(result["noise_floor"]), _caveats(result)])


def _heading(result: Mapping[str, Any]) -> Html:
    evidence = result["evidence"]
    outputs = {"path": (evidence["reference_outputs"] or {}).get("path"), "format": "stored outputs"}
    sides = {"candidate": evidence["candidate"], "reference": evidence["reference"] or outputs}
    name = {side: tag("span", of["path"], class_="path") for side, of in sides.items()}
    stored = {side: tag("span", of["format"], class_="stored") for side, of in sides.items()}
    return tag(
        "header",
        tag("p", "Parity report", class_="kicker"),
        tag(
            "h1",
            name["candidate"],
            " ",
            stored["candidate"],
            tag("span", " against ", class_="against"),
            name["reference"],
            " ",
            stored["reference"],
        ),
    )


def _deciding(result: Mapping[str, Any]) -> list[_Figure]:
    floor = result["noise_floor"]
    kl = [
        _Figure(title, number(result[key]), result[key], floor[key], number(floor[key]))
        for key, title in (("kl_mean", "KL divergence, mean"), ("kl_max", "KL divergence, largest"))
    ]
    # Of an agreement, what is lost of it stands beside what the floor loses.
    lost, floor_lost = 1 - result["top1"], 1 - floor["top1"]
    return [*kl, _Figure("Same first choice (top-1)", share(result["top1"]), lost, floor_lost, share(floor["top1"]))]


def _card(figure: _Figure, margin: float) -> Html:
    beside = join([tag("strong", times(figure.distance, figure.floor)), " the floor" if figure.floor > 0 else ""])
    return tag(
        "div",
        tag("p", figure.title, class_="title"),
        tag("p", figure.shown, class_="figure"),
        tag("p", tag("span", beside), tag("span", f"floor {figure.floor_shown}", class_="floor"), class_="beside"),
        _gauge(figure.distance / figure.floor / margin) if figure.floor > 0 else "",
        class_="card",
    )


def _gauge(of_limit: float) -> Html:
    """A bar that ends at the limit's right, the floor's part dark; the text beside it says the same."""
    limit = 100 / _GAUGE_END
    at = min(of_limit, _GAUGE_END) * limit

    def bar(kind: str, start: float, width: float, top: int = 2, height: int = 3) -> Html:
        return tag("rect", class_=kind, x=f"{start:.2f}", y=top, width=f"{width:.2f}", height=height)

    return tag(
        "svg",
        bar("rest", 0, 100),
        bar("within", 0, limit),
        bar("found" if of_limit <= 1 else "found beyond", 0, max(at, 0.8)),
        bar("limit", limit, 0.6, top=0, height=7),
        class_="gauge",
        viewBox="0 0 100 7",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _about_the_floor(floor: Mapping[str, Any]) -> Html:
    runs = ", ".join(floor["variants"])
    return tag(
        "p",
        f"The floor is how far the {floor['of']} lies from itself when only the arithmetic's order changes ({runs}). "
        f"Up to {floor['margin']:g} × the floor (the tick on each bar) a figure counts as noise. "
        "KL in nats, over all tokens; for top-1 the shares of tokens with another first choice are compared.",
        class_="note",
    )


def _caveats(result: Mapping[str, Any]) -> Html:
    """What a reader has to know beside the verdict: failed gates, and what was never exercised."""
    failed = [gate["name"] for gate in result["gates"] if not gate["passed"]]
    silent = result["coverage"]["silent"]
    notes = []
    if failed:
        notes.append(tag("li", tag("strong", "Own gate failed: "), ", ".join(failed), "."))
    if silent:
        known = tag("strong", f"{plural(len(silent), 'path')} of the model never ran: ")
        so = ". Silence is no proof: the verdict says nothing about what never ran. "
        notes.append(tag("li", known, ", ".join(silent), so, tag("a", "What it takes", href="#coverage"), "."))
    return tag("ul", *notes, class_="caveats") if notes else Html()
