"""The model card: what was made of what, how exactly, what was proved, and the command that proves it again.

Everything on it is measured or copied from the certificate and the parity report; foreign text (names, the source's own
metadata) is checked and escaped. The source's licence is kept.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import RepoCard
from huggingface_hub.utils._fixes import yaml_dump

from v4quant.checkpoint.certificate import verdict_counts
from v4quant.checkpoint.reader import Checkpoint
from v4quant.errors import CheckpointError
from v4quant.hub.gate import Exam
from v4quant.hub.location import Location
from v4quant.hub.origin import Origin
from v4quant.parity.evidence import bytes_by_role
from v4quant.parity.report.figures import number, share
from v4quant.words import decimal_bytes, plural

README_NAME = "README.md"
BYTES_PLOT = "v4quant.bytes.png"
ERRORS_PLOT = "v4quant.errors.png"
_MAX_README_BYTES = 2 * 2**20
# Keys of the source's metadata that stay true of a conversion, and what they may hold.
_KEPT_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
_KEPT_TEXT = re.compile(r"[\w .:/()+,-]{1,200}")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|!~])")


@dataclass(frozen=True)
class Card:
    """A model card and its pictures.

    Attributes:
        text: README.md.
        pictures: PNG files by name.
    """

    text: str
    pictures: Mapping[str, bytes]


def build_card(checkpoint: Checkpoint, exam: Exam, origin: Origin | None, target: Location) -> Card:
    """Write the card of a checkpoint.

    Args:
        origin: where its source is; None where that was not noted.
        target: where it will be published; the revision is None for main.

    Raises:
        CheckpointError: if the parity report lacks what its pictures show.
    """
    pictures = _pictures(exam)
    parts = [
        f"---\n{yaml_dump(_metadata(checkpoint, origin), sort_keys=False)}---",
        *([_warning(exam, checkpoint.where)] if exam.refusals else []),
        f"# {_plain(target.repo_id.partition('/')[2])}",
        _what(checkpoint, exam, origin),
        _bytes_section(checkpoint, exam, BYTES_PLOT in pictures),
        *([_exactness(exam)] if exam.is_certified else []),
        *([_parity(exam.report, ERRORS_PLOT in pictures)] if exam.report else []),
        _verify(exam, origin, target),
    ]
    return Card("\n\n".join(parts) + "\n", pictures)


def _metadata(checkpoint: Checkpoint, origin: Origin | None) -> dict[str, Any]:
    kept = _kept_metadata(checkpoint)
    license_keys = {key: value for key, value in kept.items() if key.startswith("license")}
    base = {"base_model": origin.repo_id, "base_model_relation": "quantized"} if origin else {}
    others = {key: value for key, value in kept.items() if key not in license_keys}
    tags = ["deepseek_v4", "v4quant", checkpoint.scheme.name]
    return license_keys | base | others | {"tags": tags}


def _kept_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the source's own card says that stays true; nothing of a card that cannot be read."""
    files = checkpoint.files
    if README_NAME not in files or files.size(README_NAME) > _MAX_README_BYTES:
        return {}
    try:
        found = RepoCard(files.read(README_NAME).decode(), ignore_metadata_errors=True).data
    except Exception:  # whatever the YAML parser raises for a foreign text
        return {}
    return {key: value for key in _KEPT_KEYS if _is_plain(value := getattr(found, key, None))}


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= 100 and all(isinstance(own, str) and _is_plain(own) for own in value)
    return isinstance(value, str) and _KEPT_TEXT.fullmatch(value) is not None


def _warning(exam: Exam, where: str) -> str:
    """What speaks against it, without the place where it lay on the publisher's machine."""
    here = re.compile(rf"(?<!\S){re.escape(where)}(?:/|(?=[\s:]))")
    reasons = "\n".join(f"> - {_plain(here.sub('', refusal))}" for refusal in exam.refusals[:20])
    first = "**NOT VERIFIED. This checkpoint did not pass v4quant's gate and was published in spite of it.**"
    return f"> {first}\n>\n{reasons}"


def _what(checkpoint: Checkpoint, exam: Exam, origin: Origin | None) -> str:
    certificate = exam.certificate
    text = f"{_plain(checkpoint.release)}, stored as **{checkpoint.scheme.name}**: "
    text += f"{plural(len(checkpoint.tensors), 'tensor')}, {decimal_bytes(checkpoint.bytes)}."
    if certificate is None:
        return text
    source = (
        f"[{origin.repo_id}](https://huggingface.co/{origin.repo_id}/tree/{origin.commit}) at commit `{origin.commit}`"
        if origin
        else "a checkpoint whose repository was not noted"
    )
    return (
        f"{text}\n\nConverted by v4quant {_plain(certificate.tool_version)} from {source}, stored as "
        f"{_plain(certificate.source_format)} (source id `{certificate.source_id[:16]}`)."
    )


def _bytes_section(checkpoint: Checkpoint, exam: Exam, has_plot: bool) -> str:
    after = bytes_by_role(checkpoint)
    before = (exam.report or {}).get("bytes_by_role", {}).get("reference") or {}
    rows = []
    for role in sorted(after.keys() | before.keys(), key=lambda role: (-after.get(role, 0), role)):
        sizes = [after.get(role, 0)] if not before else [before.get(role, 0), after.get(role, 0)]
        rows.append([_plain(role).replace("\\_", " "), *(decimal_bytes(size) for size in sizes)])
    head = ["role", "before", "after"] if before else ["role", "bytes"]
    picture = f"\n\n![Bytes by role, before and after]({BYTES_PLOT})" if has_plot else ""
    return f"## Bytes by role\n\n{_table(head, rows)}{picture}"


def _exactness(exam: Exam) -> str:
    counts = verdict_counts(exam.verdicts)
    meaning = {
        "bit_identical": "the same bytes as the source",
        "value_exact": "other bytes, every value and sign of zero the same",
        "rounded": "at least one value changed",
    }
    rows = [[_plain(name).replace("\\_", " "), f"{count:,}", meaning[name]] for name, count in counts.items()]
    text = f"## Exactness\n\n{_table(['verdict', 'tensors', 'meaning'], rows)}\n\n"
    text += f"Negative zeros that became positive: {exam.negative_zeros_lost:,}."
    if exam.worst:
        lines = "\n".join(f"- {_plain(record.describe_error())}" for record in exam.worst)
        text += f" The weights of the largest error:\n\n{lines}"
    return f"{text}\n\nEvery tensor's verdict and hashes: `v4quant.certificate.jsonl`."


def _parity(report: Mapping[str, Any], has_plot: bool) -> str:
    floor, evidence = report["noise_floor"], report["evidence"]
    rows = [
        ["KL divergence, mean (nats)", number(report["kl_mean"]), number(floor["kl_mean"])],
        ["KL divergence, max (nats)", number(report["kl_max"]), number(floor["kl_max"])],
        ["same first choice", share(report["top1"]), share(floor["top1"])],
    ]
    text = (
        f"## Parity: {_plain(report['verdict'])}\n\n{_plain(report['in_words'])}\n\n"
        f"{_table(['', 'found', 'noise floor'], rows)}\n\nThe noise floor is what the reference differs from itself by "
        f"when sums take another order; beyond {number(floor['margin'])} times of it counts as different. "
        f"{report['coverage']['tokens']:,} tokens in {plural(len(evidence['prompts']), 'prompt')}; arithmetic: "
        f"{_plain(evidence['arithmetic']['activations'])}. The whole report: `v4quant.parity.json`."
    )
    return text + (f"\n\n![Relative error by layer]({ERRORS_PLOT})" if has_plot else "")


def _verify(exam: Exam, origin: Origin | None, target: Location) -> str:
    place = str(target) if target.revision else target.repo_id
    lines = [f"v4quant verify {place} --against {origin}"] if origin else []
    lines += [f"v4quant verify {place}"] if exam.certificate else []
    if not lines:
        lines = [f"v4quant inspect {place}"]
    what = "The first decodes both and compares every value. " if origin else ""
    block = "\n".join(lines)
    return (
        f"## Verify it yourself\n\n```\n{block}\n```\n\n{what}All is streamed over the network, nothing stored on disk."
    )


def _pictures(exam: Exam) -> dict[str, bytes]:
    if exam.report is None:
        return {}
    # matplotlib takes a second; only who draws waits for it.
    from v4quant.parity.report.plots.canvas import to_png
    from v4quant.parity.report.plots.layers import draw_errors
    from v4quant.parity.report.plots.roles import draw_bytes

    try:
        return {BYTES_PLOT: to_png(draw_bytes, exam.report), ERRORS_PLOT: to_png(draw_errors, exam.report)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the parity report lacks what is drawn from it ({type(error).__name__}: {error})",
            hint="Run v4quant parity again; the report was edited or is of another version.",
        ) from error


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: object) -> str:
    """Foreign text that Markdown shows as it is, on one line."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return _MARKDOWN.sub(r"\\\1", shown[:2000])
