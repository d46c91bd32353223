"""The page and the JSON of a parity run: what they say, that foreign text stays text, that every run makes the same."""

import errno
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity.page_reader import PageReader
from tests.parity.results import VERDICTS, make_result
from v4quant.errors import OutputError
from v4quant.parity.report import to_json, write_report

ANCHORS = ["plots", "departures", "coverage", "layers", "logits", "bytes", "config", "gates", "evidence"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of each verdict."""
    folder = tmp_path_factory.mktemp("reports")
    return {verdict: write_report(make_result(verdict), folder / verdict) for verdict in VERDICTS}


def page_of(result: dict[str, Any], folder: Path) -> PageReader:
    return PageReader.of(write_report(result, folder))


# What the page says.


@pytest.mark.parametrize(
    ("verdict", "sign", "word"),
    [("identical", "=", "Identical"), ("indistinguishable", "≈", "Indistinguishable"), ("different", "≠", "Different")],
)
def test_the_verdict_stands_on_top_in_words_and_as_a_sign(
    pages: dict[str, Path], verdict: str, sign: str, word: str
) -> None:
    page = PageReader.of(pages[verdict])
    result = make_result(verdict)
    assert page.texts.index(sign) < page.texts.index(word) < page.texts.index(result["in_words"])
    assert ("div", {"class": f"verdict {verdict}", "role": "status"}) in page.elements
    others = {"Identical", "Indistinguishable", "Different"} - {word}
    assert not others & set(page.texts)


def test_deciding_figures_stand_beside_the_floor(tmp_path: Path) -> None:
    result = make_result()
    result |= {"kl_mean": 0.0021, "kl_max": 0.5, "top1": 0.99}
    result["noise_floor"] |= {"kl_mean": 0.001, "kl_max": 0.0, "top1": 0.995}
    text = page_of(result, tmp_path).text
    assert re.search(r"KL divergence, mean\s*0\.00210\s*2\.10 × the floor\s*floor 0\.00100", text)
    assert re.search(r"KL divergence, largest\s*0\.500\s*floor is 0\s*floor 0", text)
    assert re.search(r"\(top-1\)\s*99\.00 %\s*2\.00 × the floor\s*floor 99\.50 %", text)


def test_zero_beside_a_zero_floor(tmp_path: Path) -> None:
    result = make_result("identical")
    result["noise_floor"] |= {"kl_mean": 0.0, "kl_max": 0.0, "top1": 1.0}
    page = page_of(result, tmp_path)
    assert page.texts.count("both 0") >= 3
    assert "gauge" not in {attributes.get("class") for attributes in page.attributes("svg")}


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_part_is_there_and_reachable(pages: dict[str, Path], verdict: str) -> None:
    page = PageReader.of(pages[verdict])
    anchors = list(ANCHORS)
    if verdict == "different":
        anchors.insert(ANCHORS.index("coverage"), "attribution")
        anchors.insert(anchors.index("bytes"), "conversations")
    assert [attributes["id"] for attributes in page.attributes("section")] == anchors
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for attributes in page.attributes("a")]
    assert {f"#{anchor}" for anchor in anchors} <= set(links)
    assert {link.removeprefix("#") for link in links} <= set(ids)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_plots_and_tables_can_be_read_out(pages: dict[str, Path], verdict: str) -> None:
    page = PageReader.of(pages[verdict])
    plots = [attributes for attributes in page.attributes("svg") if attributes.get("role") == "img"]
    titles = {attributes["id"] for attributes in page.attributes("title") if "id" in attributes}
    assert [plot["aria-labelledby"] for plot in plots] == [
        "errors-title",
        "kl-title",
        "disagreement-title",
        "bytes-title",
    ]
    assert titles == {plot["aria-labelledby"] for plot in plots}
    assert all("aria-hidden" in attributes for attributes in page.attributes("svg") if attributes not in plots)
    assert len(page.attributes("figcaption")) == 4
    assert len(page.attributes("caption")) == len(page.attributes("table")) >= 8
    assert all(attributes.get("scope") in ("row", "col", "colgroup") for attributes in page.attributes("th"))


def test_departures_and_their_origin(pages: dict[str, Path]) -> None:
    page = PageReader.of(pages["different"])
    assert ["layer 3", "relative error, isolated", "0.120", "0.00120", "100 ×"] in page.rows
    assert "The difference arises in layer 3, in: experts." in page.texts
    assert "layers.3.ffn.experts.0.w1.weight" in page.texts
    assert "12 of 3,145,728 values differ, first at [0, 3]: found 0.5, expected 0.25" in page.texts
    assert "layer 3 departs" in page.texts  # the plot's legend
    assert " departs" in page.texts  # the table of layers
    unlike = PageReader.of(pages["indistinguishable"])
    assert "None: every figure is within its limit." in unlike.texts
    assert " departs" not in unlike.texts


@pytest.mark.parametrize(
    ("layer", "module", "said"),
    [
        (None, "head", "The difference arises outside the layers, in: head."),
        (2, None, "The difference arises in layer 2; no single module explains it."),
    ],
)
def test_other_origins(layer: int | None, module: str | None, said: str, tmp_path: Path) -> None:
    result = make_result("different")
    result["attribution"] |= {"layer": layer, "module": module, "tensors": [], "blocks": []}
    page = page_of(result, tmp_path)
    assert said in page.texts
    assert "No stored tensor differs (value comparison of layers.3)." in page.texts


def test_departures_are_measured_by_their_limits(tmp_path: Path) -> None:
    result = make_result("different")
    result["departures"] = [
        {"figure": "1 - top1", "where": "logits", "found": 0.1, "limit": 0.02},
        {"figure": "mtp_blocks", "where": "config.json", "found": 1.0, "limit": 0.0},
    ]
    page = page_of(result, tmp_path)
    assert page.row("logits")[-1] == "5.00 ×"
    assert page.row("config.json")[-1] == "–"


def test_conversations(pages: dict[str, Path], tmp_path: Path) -> None:
    page, result = PageReader.of(pages["different"]), make_result("different")
    assert page.row("tool calls")[1] == "40" and page.row("assistant")[-2:] == ["98.90 %", "99.90 %"]
    assert any(row[:3] + row[-4:] == ["line 3", "80", "20", "0", "–", "–", "–"] for row in page.rows)
    assert ["line 1", "2", "0.0100", "✓ the same", "31 (stop)", "31 (stop)"] in page.rows
    assert ["line 3", "5", "0.250", "not known", "31 (stop)", "64 (length)"] in page.rows
    assert "reference: Let me see." in page.texts and "candidate: It may be" in page.texts
    assert 'calls get_weather {"city": "Oslo"}' in page.texts and "it was cut off" in page.texts
    result["conversations"]["continuations"]["each"][0] |= {"parts_at": None, "margin": None}
    page = page_of(result, tmp_path)
    assert ["line 1", "never", "–", "✓ the same", "31 (stop)", "31 (stop)"] in page.rows
    assert "both: Let me see." in page.texts
    result["conversations"]["continuations"] |= {"skipped": "the reference takes 160 GB", "each": []}
    result["conversations"]["tool_calls"] = None
    page = page_of(result, tmp_path)
    assert "Greedy answers were not written: the reference takes 160 GB." in page.texts
    assert page.row("tool calls") == ["tool calls", "0", *["–"] * 6]


def test_stored_outputs_in_the_place_of_a_reference(tmp_path: Path) -> None:
    result = make_result("indistinguishable")
    result["evidence"]["reference"] = None
    result["bytes_by_role"]["reference"] = None
    page = page_of(result, tmp_path)
    assert "stored outputs" in page.texts
    assert "reference.safetensors" in page.texts


def test_silence_is_no_proof(pages: dict[str, Path], tmp_path: Path) -> None:
    page = PageReader.of(pages["identical"])
    assert page.row("indexer has to choose")[1] == "never"
    top = page.text.index("1 path of the model never ran: indexer has to choose.")
    assert top < page.text.index("Where and how much") < page.text.index("Never exercised: indexer has to choose.")
    result = make_result("identical")
    result["coverage"]["silent"] = []
    result["coverage"]["paths"].pop()
    result["coverage"]["experts"][1]["seen"] = 16
    loud = page_of(result, tmp_path)
    assert "Silence" not in loud.text
    assert "never" not in loud.texts


def test_what_was_not_executed_as_often_as_expected(tmp_path: Path) -> None:
    result = make_result()
    result["coverage"]["executed"] = [
        {"what": "attention", "counted": 1234, "expected": 1235},
        {"what": "norms", "counted": 7, "expected": 7},
    ]
    page = page_of(result, tmp_path)
    assert ["attention", "1,234", "1,235", "✗ no"] in page.rows
    assert ["norms", "7", "7", "✓ yes"] in page.rows


def test_experts_that_never_ran(pages: dict[str, Path], tmp_path: Path) -> None:
    assert "95 of 96 routed experts ran. 5 layers ran all of theirs." in PageReader.of(pages["identical"]).texts
    result = make_result()
    result["coverage"]["experts"][1]["seen"], result["coverage"]["experts_seen"] = 16, 96
    page = page_of(result, tmp_path)
    assert "96 of 96 routed experts ran." in page.texts
    assert "Layers with experts that never ran" not in page.texts


def test_gates(pages: dict[str, Path], tmp_path: Path) -> None:
    assert "Own gate failed: --max-kl." in PageReader.of(pages["different"]).texts
    assert "Own gate failed" not in PageReader.of(pages["identical"]).text
    assert PageReader.of(pages["different"]).row("--max-kl")[-1] == "✗ no"
    result = make_result()
    result["gates"] = []
    assert "None were set." in page_of(result, tmp_path).texts


def test_evidence_is_whole(pages: dict[str, Path]) -> None:
    page, evidence = PageReader.of(pages["different"]), make_result("different")["evidence"]
    for side in ("reference", "candidate"):
        for key in ("source_id", "index_sha256", "config_sha256", "certificate_sha256"):
            assert evidence[side][key] is None or evidence[side][key] in page.texts
    assert evidence["reference_outputs"]["sha256"] in page.texts
    assert "prompt 1: 216 + 4 × 1" in page.texts
    assert " ".join(map(str, evidence["prompts"][1])) in page.texts
    assert len(page.attributes("details")) == 2  # and what was written
    assert "open" not in page.attributes("details")[0]


# Missing parts and extremes.


def test_parts_that_do_not_apply(tmp_path: Path) -> None:
    result = make_result("different", compressed=False)
    result |= {"mtp_logits": None, "attribution": None, "config_differences": [], "departures": []}
    for variant in result["noise_floor"]["variants"].values():
        variant["mtp_logits"] = None
    result["logits"]["perplexity"] = {"reference": None, "candidate": None}
    result["evidence"] |= {"reference_outputs": None}
    page = page_of(result, tmp_path)
    assert "No MTP logits: none of the two was run with an MTP block." in page.texts
    assert "None: both configs say the same." in page.texts
    assert "indexer picks" not in page.texts
    assert "indexer" not in page.texts
    assert "None" not in page.texts


@pytest.mark.parametrize("layers", [1, 2, 43, 61])
def test_any_number_of_layers(layers: int, tmp_path: Path) -> None:
    page = page_of(make_result("different", layers=layers), tmp_path)
    found = [row[0].removesuffix(" departs") for row in page.rows if len(row) > 10 and row[0] != "layer"]
    assert found[:layers] == list(map(str, range(layers)))
    assert f"layer {layers // 2} departs" in page.texts


@pytest.mark.parametrize("lengths", [(1,), (10,), (3,) * 700, (1200,), (1201,)])
def test_any_number_of_tokens(lengths: tuple[int, ...], tmp_path: Path) -> None:
    page = page_of(make_result(lengths=lengths), tmp_path)
    assert ("a token" in page.texts) == (sum(lengths) <= 1200)
    assert ("median of neighbours" in page.texts) == (sum(lengths) > 1200)


def test_every_error_exactly_zero(tmp_path: Path) -> None:
    page = page_of(make_result("identical", zero=True), tmp_path)
    assert page.texts.count("every value is exactly 0") == 2  # errors have a limit to draw all the same
    assert page.texts.count("exactly 0") == 5
    assert not re.search(r"\b(nan|inf)\b", page.text.lower())


def test_a_large_report_stays_small(tmp_path: Path) -> None:
    path = write_report(make_result("different", layers=61, lengths=(9000, 7000, 3000, 1000)), tmp_path)
    plots = re.findall(r"<svg viewBox.*?</svg>", path.read_text(encoding="utf-8"), re.DOTALL)
    assert len(plots) == 4
    assert max(map(len, plots)) < 300_000
    page = PageReader.of(path)
    assert {"0", "30", "60", "prompt 1", "prompt 4"} <= set(page.texts)
    assert "stands for up to 34 neighbouring tokens" in page.text


# Hostile text.


HOSTILE = "<script>\"'&${verdict}</td>\x1b[31m\x00\u202e\udc80\n"
SEEN = "<script>\"'&${verdict}</td>\\x1b[31m\\x00\\u202e\\udc80\\n"
# Chosen by v4quant from a fixed few, and checked as such.
OURS = {"verdict"}


def poisoned(value: Any, marks: list[str], key: str = "") -> Any:
    """The same with every text, and every key of a mapping that holds foreign names, replaced by hostile text."""

    def hostile() -> str:
        marks.append(f"{len(marks)}#")
        return marks[-1] + HOSTILE

    if isinstance(value, str):
        return value if key in OURS else hostile()
    if isinstance(value, list):
        return [poisoned(item, marks, key) for item in value]
    if isinstance(value, dict):
        foreign = key in ("variants", "versions")
        return {hostile() if foreign else name: poisoned(of, marks, name) for name, of in value.items()}
    return value


def test_hostile_text_is_seen_and_harmless(tmp_path: Path) -> None:
    marks: list[str] = []
    result = poisoned(make_result("different", layers=3), marks)
    roles = result["bytes_by_role"]
    roles["reference"] = {f"{HOSTILE}{role}": size for role, size in roles["reference"].items()}
    path = write_report(result, tmp_path)
    page = PageReader.of(path)
    assert len(marks) > 60
    hidden = [mark for mark in marks if mark + SEEN not in page.text]
    assert hidden == []
    assert f"{SEEN}norms" in page.texts
    assert not page.attributes("script")
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    assert set(map(len, re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", path.read_text(encoding="utf-8")))) == set()
    assert json.loads((tmp_path / "parity.json").read_bytes()) == result


def test_the_same_elements_whatever_the_text(tmp_path: Path) -> None:
    """Hostile text adds no element to the tables."""
    plain, hostile = make_result("different"), poisoned(make_result("different"), [])
    counts = []
    for result in (plain, hostile):
        page = page_of(result, tmp_path)
        counts.append([len(page.attributes(tag)) for tag in ("table", "tr", "td", "th", "svg", "section", "a", "p")])
    assert counts[0] == counts[1]


# Self-contained and the same every time.


@pytest.mark.parametrize("verdict", VERDICTS)
def test_nothing_comes_from_elsewhere(pages: dict[str, Path], verdict: str) -> None:
    text, page = pages[verdict].read_text(encoding="utf-8"), PageReader.of(pages[verdict])
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "link", "img", "image", "iframe", "object", "embed", "base", "form", "foreignobject"}
    assert "http" not in text
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for _, attributes in page.elements:
        assert not {"src", "srcset", "data", "action", "xlink:href"} & set(attributes)
        assert attributes.get("href", "#plots").removeprefix("#") in ids
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= ids


def test_the_same_bytes_on_every_run(pages: dict[str, Path], tmp_path: Path) -> None:
    """In another process, with other hashes and another matplotlib configuration, over an earlier report."""
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\nsvg.fonttype: path\naxes.grid: True\n")
    code = (
        "import sys; from pathlib import Path; from tests.parity.results import make_result;"
        "from v4quant.parity.report import write_report;"
        "[write_report(make_result('different'), Path(sys.argv[1])) for _ in range(2)];"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    folder = tmp_path / "again"
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(folder)], check=True, env=environment)
    for name in ("report.html", "parity.json"):
        first = hashlib.sha256((pages["different"].parent / name).read_bytes()).hexdigest()
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == first, name
    assert sorted(path.name for path in folder.iterdir()) == ["parity.json", "report.html"]


def test_matplotlib_is_loaded_by_who_draws_and_left_as_it_was(tmp_path: Path) -> None:
    code = (
        "import sys, v4quant.parity, v4quant.parity.report as report;"
        "assert not {'matplotlib', 'torch'} & set(sys.modules);"
        "import matplotlib; from pathlib import Path; from tests.parity.results import make_result;"
        "before = dict(matplotlib.rcParams); report.write_report(make_result(), Path(sys.argv[1]));"
        "assert dict(matplotlib.rcParams) == before"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], check=True)


# parity.json.


@pytest.mark.parametrize("verdict", VERDICTS)
def test_json_says_what_the_result_says_and_can_be_read(pages: dict[str, Path], verdict: str) -> None:
    text = (pages[verdict].parent / "parity.json").read_text(encoding="utf-8")
    result = make_result(verdict)
    assert json.loads(text) == result
    assert list(json.loads(text)) == list(result)
    lines = text.splitlines()
    assert max(map(len, lines)) < 160
    assert len(lines) < 1300  # the divergences alone are 1,800 numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, 2.5, -3e-9]}, '{\n  "a": [1, 2.5, -3e-09]\n}\n'),
        ({"a": [[1, 2], [], [3]]}, '{\n  "a": [\n    [1, 2],\n    [],\n    [3]\n  ]\n}\n'),
        ({"a": ["x", 1]}, '{\n  "a": [\n    "x",\n    1\n  ]\n}\n'),
        ({"a": "[\n  1,\n  2\n]"}, '{\n  "a": "[\\n  1,\\n  2\\n]"\n}\n'),
        ({"a": [True, None]}, '{\n  "a": [\n    true,\n    null\n  ]\n}\n'),
    ],
)
def test_lists_of_numbers_are_compact(value: dict[str, Any], text: str) -> None:
    assert to_json(value) == text
    assert json.loads(text) == value


def test_long_lists_are_filled_into_lines() -> None:
    values = [at / 7 for at in range(1000)]
    text = to_json({"values": values})
    assert json.loads(text) == {"values": values}
    lines = text.splitlines()[2:-2]
    assert all(80 < len(line) < 120 and line.startswith("    ") for line in lines[:-1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_refused_and_nothing_written(value: float, tmp_path: Path) -> None:
    result = make_result()
    result["logits"]["kl_by_token"][7] = value
    with pytest.raises(ValueError, match="JSON"):
        write_report(result, tmp_path / "report")
    assert not (tmp_path / "report").exists()


# Disks that refuse.


def test_the_folder_is_made_and_the_page_returned(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert write_report(make_result(), folder) == folder / "report.html"
    assert sorted(path.name for path in folder.iterdir()) == ["parity.json", "report.html"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    with pytest.raises(OutputError, match="report"):
        write_report(make_result(), tmp_path / "report")
    assert (tmp_path / "report").read_text() == "mine"


@pytest.mark.parametrize("name", ["replace", "fsync", "unlink"])
@pytest.mark.parametrize("call", range(4))
def test_a_disk_that_refuses_sooner_or_later(
    pages: dict[str, Path], name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails: an OutputError, nothing half written, and never a parity.json without its own page."""
    for file in ("report.html", "parity.json"):
        (tmp_path / file).write_bytes((pages["identical"].parent / file).read_bytes())
    original: Callable[..., Any] = getattr(os, name)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        try:
            write_report(make_result("different"), tmp_path)
        except OutputError as error:
            assert "No space left" in str(error)
        else:
            assert calls <= call
    page = (tmp_path / "report.html").read_bytes()
    (verdict,) = [verdict for verdict, path in pages.items() if path.read_bytes() == page]
    if (tmp_path / "parity.json").exists():
        assert json.loads((tmp_path / "parity.json").read_bytes())["verdict"] == verdict


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OutputError, match="Permission denied"):
        write_report(make_result(), tmp_path / "report")
