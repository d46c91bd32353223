"""What stands where on the page: the verdict, four plots with a line to read each by, the tables."""

import importlib.resources
from collections.abc import Mapping
from string import Template
from typing import Any

from v4quant.parity.report.conversations import conversations_part
from v4quant.parity.report.figures import factor, number, share
from v4quant.parity.report.findings import attribution_part, departures_part, layers_part, logits_part
from v4quant.parity.report.markup import Column, Html, join, section, shown, table, tag
from v4quant.parity.report.plots.canvas import to_svg
from v4quant.parity.report.plots.layers import draw_disagreement, draw_errors
from v4quant.parity.report.plots.roles import by_role, draw_bytes
from v4quant.parity.report.plots.tokens import draw_kl, tokens_a_mark
from v4quant.parity.report.run_facts import config_part, coverage_part, evidence_part, gates_part
from v4quant.parity.report.verdict import verdict_part
from v4quant.words import decimal_bytes, plural

_TEMPLATE = "page.html"


def build_page(result: Mapping[str, Any]) -> str:
    """The whole page, self-contained.

    Args:
        result: see write_report.
    """
    template = Template(importlib.resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    evidence = result["evidence"]
    against = evidence["reference"] or evidence["reference_outputs"]
    sections = [
        _plots_part(result),
        departures_part(result),
        attribution_part(result),
        coverage_part(result),
        layers_part(result),
        logits_part(result),
        conversations_part(result),
        _bytes_part(result),
        config_part(result),
        gates_part(result),
        evidence_part(result),
    ]
    return template.substitute(
        title=shown(f"{result['verdict']}: {evidence['candidate']['path']} against {against['path']}"),
        verdict=verdict_part(result),
        contents=_contents(result),
        sections=join(sections),
        version=shown(result["tool_version"]),
    )


def _contents(result: Mapping[str, Any]) -> Html:
    words = [
        "plots",
        "departures",
        "attribution",
        "coverage",
        "layers",
        "logits",
        "conversations",
        "bytes",
        "config",
        "gates",
        "evidence",
    ]
    if result["attribution"] is None:
        words.remove("attribution")
    if result["conversations"] is None:
        words.remove("conversations")
    links = (tag("a", word.capitalize(), href=f"#{word}") for word in words)
    return tag("nav", join(links, " "), aria_label="Contents")


def _plots_part(result: Mapping[str, Any]) -> Html:
    of = result["noise_floor"]["of"]
    return section(
        "plots",
        "Where and how much",
        _errors_figure(result, of),
        _kl_figure(result),
        _disagreement_figure(result, of),
        _bytes_figure(result),
    )


def _errors_figure(result: Mapping[str, Any], of: str) -> Html:
    layers = result["layers"]
    worst = max(layers, key=lambda layer: float(layer["isolated_rel_err"]))
    words = (
        f"Isolated and accumulated relative error of {plural(len(layers), 'layer')}. The largest isolated one is "
        f"{number(worst['isolated_rel_err'])}, in layer {worst['layer']}. All values are in the table of layers."
    )
    return _figure(
        "Relative error of the residual streams, by layer",
        to_svg(draw_errors, result, "errors", words),
        f"In the dark band a layer differs no more than the {of} from itself there; above the light band it departs: "
        "the limit rests on the noise of all layers, and accumulated errors are judged after the last layer alone. The "
        "upper plot shows where a difference arises, the lower one what becomes of it.",
    )


def _kl_figure(result: Mapping[str, Any]) -> Html:
    kl, many = result["logits"]["kl"], tokens_a_mark(result)
    words = (
        f"KL divergence at {plural(result['logits']['tokens'], 'token')}: median {number(kl['median'])}, "
        f"99 % below {number(kl['p99'])}, largest {number(kl['max'])}."
    )
    reading = (
        "Single tokens far above the median hint at a path that is seldom taken; a whole prompt above it, or a step at "
        "one position, at a setting."
    )
    if many > 1:
        reading += f" A mark stands for up to {many:,} neighbouring tokens; the largest is always shown."
    return _figure("Divergence of the next-token distribution, by token", to_svg(draw_kl, result, "kl", words), reading)


def _disagreement_figure(result: Mapping[str, Any], of: str) -> Html:
    lowest = min(result["layers"], key=lambda layer: float(layer["expert_agreement"]))
    words = (
        "Share of routed experts, and of indexer picks, that only one of the two chose, by layer. At most "
        f"{share(1 - lowest['expert_agreement'])} of the experts, in layer {lowest['layer']}. All values are in the "
        "table of layers."
    )
    return _figure(
        "Disagreement on experts and on what attention reads, by layer",
        to_svg(draw_disagreement, result, "disagreement", words),
        f"Marks in the band disagree no more than the {of} with itself. Marks: both fed the reference's input; dashes: "
        "each fed its own.",
    )


def _bytes_figure(result: Mapping[str, Any]) -> Html:
    words = "Stored bytes by role, reference and candidate. All values are in the table of bytes."
    return _figure(
        "Stored bytes, by role",
        to_svg(draw_bytes, result, "bytes", words),
        "What the conversion changed in size; in brackets candidate to reference.",
    )


def _figure(title: str, plot: Html, reading: str) -> Html:
    return tag("figure", tag("h3", title), tag("div", plot, class_="plot"), tag("figcaption", reading))


def _bytes_part(result: Mapping[str, Any]) -> Html:
    roles = by_role(result)
    everything = ("all", sum(role[1] for role in roles), sum(role[2] for role in roles))
    columns = [Column("role"), *(Column(name, numeric=True) for name in ("reference", "candidate", "factor"))]
    rows = [
        (
            role.replace("_", " "),
            decimal_bytes(before),
            decimal_bytes(after),
            factor(after / before) if before else "new",
        )
        for role, before, after in (*roles, everything)
    ]
    return section("bytes", "Bytes", table("Stored bytes by role", columns, rows))
