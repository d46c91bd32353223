"""Tables of what was measured: departures and where they come from, every layer, every figure of the logits."""

from collections.abc import Mapping
from typing import Any

from v4quant.parity.report.figures import NOT_APPLICABLE, factor, number, share
from v4quant.parity.report.markup import Column, Html, join, section, table, tag
from v4quant.parity.sentences import FIGURE_NAMES
from v4quant.words import plural

_KINDS = {"window": "window", "csa": "CSA", "hca": "HCA"}


def departures_part(result: Mapping[str, Any]) -> Html:
    """Every figure beyond its limit, the worst first."""
    found = result["departures"]
    if not found:
        return section("departures", "Departures", tag("p", "None: every figure is within its limit."))
    columns = [
        Column("where"),
        Column("figure"),
        Column("found", numeric=True),
        Column("limit", numeric=True),
        Column("beyond it", numeric=True),
    ]
    rows = [
        (
            of["where"],
            FIGURE_NAMES.get(of["figure"], of["figure"]),
            number(of["found"]),
            number(of["limit"]),
            f"{factor(of['found'] / of['limit'])} ×" if of["limit"] else NOT_APPLICABLE,
        )
        for of in found
    ]
    return section("departures", "Departures", table("Figures beyond their limits, the worst first", columns, rows))


def attribution_part(result: Mapping[str, Any]) -> Html:
    """Which layer, which module, what each swap leaves, which tensors differ."""
    attribution = result["attribution"]
    if attribution is None:
        return Html()
    parts: list[Html] = [tag("p", *_origin(attribution), class_="lead")]
    if attribution["blocks"]:
        parts.append(_swaps(attribution["blocks"]))
    if attribution["tensors"]:
        rows = [(tag("code", of["tensor"]), of["reason"]) for of in attribution["tensors"]]
        columns = [Column("tensor", kind="name"), Column("how it differs", kind="prose")]
        parts.append(table(f"Tensors that differ, from a {attribution['tensors_from']}", columns, rows))
    else:
        parts.append(tag("p", f"No stored tensor differs ({attribution['tensors_from']})."))
    return section("attribution", "Where the difference comes from", *parts)


def _origin(attribution: Mapping[str, Any]) -> list[object]:
    layer, module = attribution["layer"], attribution["module"]
    if layer is None and module is None:
        return ["No single block departs: small differences of many add up."]
    where = "outside the layers" if layer is None else f"in layer {layer}"
    if module is None:
        return ["The difference arises ", tag("strong", where), "; no single module explains it."]
    return ["The difference arises ", tag("strong", where), ", in: ", tag("strong", module), "."]


def _swaps(blocks: list[Mapping[str, Any]]) -> Html:
    columns = [
        Column("block"),
        Column("module from the reference"),
        Column("error left", numeric=True),
        Column("explains", numeric=True),
    ]
    rows: list[tuple[object, ...]] = []
    for block in blocks:
        rows.append((tag("code", block["block"]), "none", number(block["error"]), NOT_APPLICABLE))
        rows += (
            (tag("code", block["block"]), of["module"], number(of["error"]), share(of["explains"]))
            for of in block["swapped"]
        )
    return table("Error left when one module alone is taken from the reference", columns, rows)


def layers_part(result: Mapping[str, Any]) -> Html:
    """One row a layer."""
    layers = result["layers"]
    indexed = any(layer["indexer_overlap"] is not None for layer in layers)
    isolated, accumulated, agreement = "isolated", "accumulated", "chosen by both"
    columns = [
        Column("layer"),
        Column("kind"),
        Column("routing"),
        *(
            column
            for group in (isolated, accumulated)
            for column in (
                Column("rel. error", numeric=True, group=group),
                Column("of limit", numeric=True, group=group),
                Column("bit-equal", numeric=True, group=group),
            )
        ),
        Column("1 - cosine", numeric=True),
        Column("experts", numeric=True, group=agreement),
        Column("floor", numeric=True, group=agreement),
    ]
    if indexed:
        columns += [Column("indexer", numeric=True, group=agreement), Column("floor", numeric=True, group=agreement)]
    columns.append(Column("worst token", numeric=True))
    rows = [_layer_row(layer, indexed=indexed) for layer in layers]
    marked = [place for place, layer in enumerate(layers) if layer["departs"]]
    note = "Isolated: both fed the reference's input. Accumulated: each fed its own. Bit-equal: share of tokens. "
    note += "Cosine and worst token are those of the isolated run; a worst token's own relative error is in brackets."
    return section(
        "layers", "Layers", table("All layers", columns, rows, marked, dense=True), tag("p", note, class_="note")
    )


def _layer_row(layer: Mapping[str, Any], *, indexed: bool) -> list[object]:
    floor, isolated, accumulated = layer["floor"], layer["isolated"], layer["accumulated"]
    cells: list[object] = [
        join([layer["layer"], tag("span", " departs", class_="flag") if layer["departs"] else ""]),
        _KINDS.get(layer["kind"], layer["kind"]),
        layer["routing"],
    ]
    for key, streams in (("isolated_rel_err", isolated), ("accumulated_rel_err", accumulated)):
        cells += [number(layer[key]), factor(layer[key] / layer["limit"][key]), share(streams["bit_equal"])]
    cells += [number(1 - layer["cosine"]), share(layer["expert_agreement"]), share(floor["expert_agreement"])]
    if indexed:
        cells += [share(layer["indexer_overlap"]), share(floor["indexer_overlap"])]
    worst = f"{isolated['worst_token']:,} ({number(isolated['worst_token_rel_err'])})"
    return [*cells, NOT_APPLICABLE if isolated["worst_token_rel_err"] == 0 else worst]


def logits_part(result: Mapping[str, Any]) -> Html:
    """Every figure of the logits and of the MTP logits, beside those of each variant of the floor."""
    variants = result["noise_floor"]["variants"]
    columns, runs = [Column("figure")], []
    for key, name in (("logits", "logits"), ("mtp_logits", "MTP logits")):
        if result[key] is not None:
            floors = {f"floor: {variant}": of[key] for variant, of in variants.items() if of[key] is not None}
            columns += (Column(title, numeric=True, group=name) for title in ("candidate", *floors))
            runs += [_logit_figures(run) for run in (result[key], *floors.values())]
    rows = [(name, *(run[name] for run in runs)) for name in runs[0]]
    parts = [table(f"Next-token logits, {plural(result['logits']['tokens'], 'token')}", columns, rows)]
    if result["mtp_logits"] is None:
        parts.append(tag("p", "No MTP logits: none of the two was run with an MTP block."))
    note = (
        "KL(reference ‖ candidate) in nats, reversed KL(candidate ‖ reference); of a floor, of the two runs compared."
    )
    return section("logits", "Logits", *parts, tag("p", note, class_="note"))


def _logit_figures(logits: Mapping[str, Any]) -> dict[str, str]:
    found = {"bit-equal tokens": share(logits["bit_equal"])}
    for key, name in (("kl", "KL"), ("kl_reverse", "reversed KL")):
        found |= {f"{name}, {part}": number(logits[key][part]) for part in ("mean", "median", "p99", "max")}
    perplexity = logits["perplexity"]
    return found | {
        "same first choice (top-1)": share(logits["top1"]),
        "of the five best in common": share(logits["top5_overlap"]),
        "perplexity, reference": perplexity_shown(perplexity["reference"]),
        "perplexity, candidate": perplexity_shown(perplexity["candidate"]),
    }


def perplexity_shown(value: float | None) -> str:
    """Six significant digits: two that differ a little must not look alike."""
    return NOT_APPLICABLE if value is None else f"{value:.6g}"
