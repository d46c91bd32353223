"""`v4quant parity`: JSON keys, exit codes, gates, and what a tired person types."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.checkpoint.conversion import edit, write_small
from tests.cli.broken_inputs import CASES, CONFIGS, INDEXES, NUMBERS, SHARDS, TENSORS, Case
from tests.cli.test_broken_inputs import assert_one_clear_message
from tests.model.references import named
from tests.parity.runs import with_config
from v4quant.checkpoint.reader import open_checkpoint
from v4quant.cli.main import main

Capture = pytest.CaptureFixture[str]
SHORT = ["--length", "24"]
CONTRACT = {"verdict", "kl_mean", "kl_max", "top1", "noise_floor", "layers"}
OF_A_LAYER = {
    "layer",
    "isolated_rel_err",
    "accumulated_rel_err",
    "cosine",
    "expert_agreement",
    "indexer_overlap",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound checkpoints: native, the same in fp8, one with other weights, one with other experts' scales."""
    folder = tmp_path_factory.mktemp("parity")
    native = write_small(folder / "native", mtp=True)
    write_small(folder / "other", mtp=True, seed=1)
    write_small(folder / "wide", mtp=True, experts=4)
    write_small(folder / "no-mtp")
    shutil.copytree(native, folder / "changed")
    edit(folder / "changed", "layers.0.attn.wq_a.weight", lambda rows: rows.__setitem__(slice(None), rows ^ 0x80))
    tokenizer = Tokenizer(models.WordLevel({"once": 7, "upon": 8, "?": 9}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(native / "tokenizer.json"))
    assert main(["convert", str(native), str(folder / "fp8"), "--to", "fp8"]) == 0
    safetensors.torch.save_file({"input_ids": torch.arange(24)}, folder / "tokens.safetensors")
    (folder / "tokens.jsonl").write_text("[1, 2, 3]\n[4, 5]\n")
    (folder / "text.txt").write_text("once upon once")
    command = ["reference", str(native), str(folder / "outputs.safetensors"), "--tokens"]
    assert main([*command, str(folder / "tokens.safetensors"), "--prefill", "20"]) == 0
    outputs = safetensors.torch.load_file(folder / "outputs.safetensors")
    outputs["logits"] += 1e-4 * torch.randn(outputs["logits"].shape, generator=torch.Generator().manual_seed(0))
    safetensors.torch.save_file(outputs, folder / "near.safetensors", {"prefill": "20"})
    return folder


def run(folder: Path, *arguments: str, capsys: Capture, exit_code: int = 0) -> dict[str, Any]:
    """Run in JSON mode on folders of the fixture; gives the one object of stdout."""
    capsys.readouterr()
    places = [str(folder / word) if (folder / word).exists() else word for word in arguments]
    assert main(["parity", *places, "--json"]) == exit_code
    printed = capsys.readouterr()
    if exit_code:
        assert_one_clear_message(printed.err)

    def refuse(number: str) -> float:
        raise AssertionError(f"{number} is no JSON")

    found: dict[str, Any] = json.loads(printed.out, parse_constant=refuse)
    return found


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for own in value.values() for number in numbers_in(own)]
    if isinstance(value, list):
        return [number for own in value for number in numbers_in(own)]
    return [value] if isinstance(value, float) else []


def test_a_conversion_is_identical(folder: Path, capsys: Capture) -> None:
    found = run(folder, "fp8", "--against", "native", *SHORT, capsys=capsys)
    assert found.keys() >= CONTRACT
    assert found["noise_floor"].keys() >= {"kl_mean", "kl_max", "top1"}
    assert [layer.keys() >= OF_A_LAYER for layer in found["layers"]] == [True]
    assert (found["verdict"], found["kl_mean"], found["kl_max"], found["top1"]) == ("identical", 0.0, 0.0, 1.0)
    layer = found["layers"][0]
    assert (layer["layer"], layer["isolated_rel_err"], layer["accumulated_rel_err"]) == (0, 0.0, 0.0)
    assert (layer["cosine"], layer["expert_agreement"], layer["indexer_overlap"]) == (1.0, 1.0, None)
    assert found["noise_floor"]["kl_mean"] > 0
    assert found["mtp_logits"]["bit_equal"] == 1.0
    assert found["coverage"]["tokens"] == sum(len(prompt) for prompt in found["evidence"]["prompts"]) == 24
    assert [sum(chunks) for chunks in found["evidence"]["chunks"]] == [24]
    assert found["evidence"]["peak_memory_bytes"] > 2**20
    assert "CSA entries attended to" not in found["coverage"]["silent"], "this model has none"
    assert all(math.isfinite(number) for number in numbers_in(found))


def test_other_weights_are_different(folder: Path, capsys: Capture) -> None:
    found = run(folder, "changed", "--against", "native", *SHORT, capsys=capsys, exit_code=1)
    assert found["verdict"] == "different"
    assert found["departures"]
    assert (found["attribution"]["layer"], found["attribution"]["module"]) == (0, "attention projections")
    assert [entry["tensor"] for entry in found["attribution"]["tensors"]] == ["layers.0.attn.wq_a.weight"]


def test_each_key_holds_what_its_name_says(folder: Path, capsys: Capture) -> None:
    """On another checkpoint, embedding included, where no two figures are equal."""
    found = run(folder, "other", "--against", "native", *SHORT, capsys=capsys, exit_code=1)
    spread, (layer,) = found["logits"]["kl"], found["layers"]
    assert (found["kl_mean"], found["kl_max"], found["top1"]) == (
        spread["mean"],
        spread["max"],
        found["logits"]["top1"],
    )
    assert found["kl_max"] == max(found["logits"]["kl_by_token"]) > found["kl_mean"] > 0
    assert layer["isolated_rel_err"] == layer["isolated"]["rel_err"]
    assert layer["accumulated_rel_err"] == layer["accumulated"]["rel_err"] != layer["isolated_rel_err"]
    assert layer["cosine"] == layer["isolated"]["cosine"] != layer["accumulated"]["cosine"]
    assert layer["expert_agreement"] == layer["isolated_routing"]["agreement"]
    assert (layer["kind"], layer["routing"], layer["departs"]) == ("window", "hash", True)
    variants = [own["logits"] for own in found["noise_floor"]["variants"].values()]
    assert found["noise_floor"]["kl_mean"] == max(own["kl"]["mean"] for own in variants) > 0
    assert found["noise_floor"]["kl_max"] == max(own["kl"]["max"] for own in variants)
    assert found["noise_floor"]["top1"] == min(own["top1"] for own in variants)
    assert found["attribution"]["module"] == "embedding"


def test_text_output(folder: Path, capsys: Capture) -> None:
    """The verdict first; failures are told on stderr, with what to do next."""
    assert main(["parity", str(folder / "fp8"), "--against", str(folder / "native"), *SHORT]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("IDENTICAL: ")
    assert "24 tokens in 1 prompt, 6 decode steps" in printed.out
    assert "error" not in printed.err
    assert main(["parity", str(folder / "changed"), "--against", str(folder / "native"), *SHORT]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("DIFFERENT: ")
    assert "beyond its limit, " in printed.out
    assert "layers.0.attn.wq_a.weight: " in printed.out
    assert "does not compute what the reference computes" in assert_one_clear_message(printed.err)


def test_stored_outputs(folder: Path, capsys: Capture) -> None:
    arguments = ["--reference-outputs", "outputs.safetensors"]
    found = run(folder, "native", *arguments, capsys=capsys)
    assert found["verdict"] == "identical"
    assert found["noise_floor"]["of"] == "candidate"
    assert found["evidence"]["reference"] is None
    assert found["evidence"]["reference_outputs"]["prefill"] == "20"
    assert found["evidence"]["chunks"] == [[20, 1, 1, 1, 1]]
    assert found["layers"][0].keys() >= OF_A_LAYER
    wrong = run(folder, "changed", *arguments, capsys=capsys, exit_code=1)
    assert wrong["verdict"] == "different"


@pytest.mark.parametrize(
    ("arguments", "prompts", "chunks"),
    [
        (["--tokens", "tokens.jsonl", "--prefill", "2"], [[1, 2, 3], [4, 5]], [[2, 1], [2]]),
        (["--tokens", "tokens.safetensors", "--prefill", "24"], [list(range(24))], [[24]]),
        (["--text", "text.txt", "--length", "2"], [[7, 8]], [[2]]),
        (["--text", "text.txt"], [[7, 8, 7]], [[3]]),
    ],
)
def test_tokens_of_the_user(
    arguments: list[str], prompts: list[list[int]], chunks: list[list[int]], folder: Path, capsys: Capture
) -> None:
    found = run(folder, "fp8", "--against", "native", *arguments, capsys=capsys)
    assert found["verdict"] == "identical"
    assert found["evidence"]["prompts"] == prompts
    assert found["evidence"]["chunks"] == chunks
    assert found["evidence"]["tokens_from"] == str(folder / arguments[1])


def test_one_token(folder: Path, capsys: Capture) -> None:
    """No token follows, nothing is a decode step, and the MTP block has nothing to predict from."""
    found = run(folder, "fp8", "--against", "native", "--length", "1", capsys=capsys)
    assert found["verdict"] == "identical"
    assert found["mtp_logits"] is None
    assert found["logits"]["perplexity"] == {"reference": None, "candidate": None}
    assert {"MTP block 0", "decode steps"} <= set(found["coverage"]["silent"])


def test_a_candidate_without_the_mtp_block(folder: Path, capsys: Capture) -> None:
    """Equal in all else: the weights of the layers do not depend on what comes behind them."""
    found = run(folder, "no-mtp", "--against", "native", *SHORT, capsys=capsys, exit_code=1)
    assert found["verdict"] == "different"
    assert found["departures"][0]["figure"] == "mtp_blocks"
    assert found["logits"]["bit_equal"] == 1.0
    assert "The reference has MTP blocks that the candidate has not." in found["in_words"]
    more = run(folder, "native", "--against", "no-mtp", *SHORT, capsys=capsys)
    assert more["verdict"] == "identical"


def test_settings_of_both_sides(folder: Path, capsys: Capture) -> None:
    settings = ["--index-topk", "3", "--arithmetic", "stored"]
    found = run(folder, "fp8", "--against", "native", *SHORT, *settings, capsys=capsys)
    assert found["evidence"]["index_topk"] == 3
    assert found["config_differences"] == []
    assert found["evidence"]["arithmetic"]["activations"] == "stored"
    assert "Each side was run as its own format would be" in found["in_words"]


def test_gates_that_pass(folder: Path, capsys: Capture) -> None:
    """At their limits."""
    found = run(folder, "fp8", "--against", "native", *SHORT, "--min-top1", "1", "--max-kl", "0", capsys=capsys)
    assert [(gate["name"], gate["passed"]) for gate in found["gates"]] == [("--max-kl", True), ("--min-top1", True)]


def test_gates_that_do_not_pass(folder: Path, capsys: Capture) -> None:
    """Indistinguishable from stored outputs, and not the same: the verdict is passed, the gate is not."""
    arguments = ["--reference-outputs", "near.safetensors", "--max-kl", "0"]
    found = run(folder, "native", *arguments, "--min-top1", "0.9", capsys=capsys, exit_code=1)
    assert found["verdict"] == "indistinguishable"
    assert [gate["passed"] for gate in found["gates"]] == [False, True]
    assert main(["parity", str(folder / "native"), arguments[0], str(folder / arguments[1]), *arguments[2:]]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("INDISTINGUISHABLE: ")
    assert "--max-kl 0: found" in printed.out
    assert "FAILED" in printed.out
    assert assert_one_clear_message(printed.err).startswith("error: --max-kl is 0, found")


AGAINST = ["native", "--against", "native"]
STORED = ["native", "--reference-outputs", "outputs.safetensors"]
WRONG: list[tuple[list[str], int, str]] = [
    (["native"], 2, "give what to compare with: --against REFERENCE or --reference-outputs FILE"),
    ([*AGAINST, "--reference-outputs", "outputs.safetensors"], 2, "--against and --reference-outputs are both given"),
    ([*AGAINST, "--tokens", "tokens.jsonl", "--text", "text.txt"], 2, "--tokens and --text are both given"),
    ([*AGAINST, "--tokens", "tokens.jsonl", "--length", "3"], 2, "--length is given with --tokens"),
    ([*STORED, "--tokens", "tokens.jsonl"], 2, "--tokens is given with --reference-outputs"),
    ([*STORED, "--text", "text.txt"], 2, "--text is given with --reference-outputs"),
    ([*STORED, "--length", "3"], 2, "--length is given with --reference-outputs"),
    ([*STORED, "--prefill", "3"], 2, "--prefill is given with --reference-outputs"),
    ([*STORED, "--index-topk", "3"], 2, "--index-topk is given with --reference-outputs"),
    ([*AGAINST, "--arithmetic", "none"], 2, "--arithmetic is 'none', expected release or stored"),
    ([*AGAINST, "--arithmetic", ""], 2, "--arithmetic is ''"),
    ([*AGAINST, "--device", "gpu"], 2, "--device is 'gpu', expected cpu or cuda"),
    ([*AGAINST, "--length", "0"], 2, "--length"),
    ([*AGAINST, "--length", "2000000"], 2, "are to be built, expected at most 131,072"),
    ([*AGAINST, "--prefill", "0"], 2, "--prefill"),
    ([*AGAINST, "--length", "9", "--prefill", "10"], 2, "--prefill is 10, expected 1 to the 9 tokens"),
    ([*AGAINST, "--index-topk", "0"], 2, "--index-topk"),
    ([*AGAINST, "--index-topk", "2049"], 2, "--index-topk"),
    ([*AGAINST, "--max-kl", "-1"], 2, "--max-kl"),
    ([*AGAINST, "--max-kl", "nan"], 2, "--max-kl"),
    ([*AGAINST, "--max-kl", "a lot"], 2, "--max-kl"),
    ([*AGAINST, "--min-top1", "1.5"], 2, "--min-top1"),
    ([*AGAINST, "--min-top1", "nan"], 2, "--min-top1"),
    ([*AGAINST, "--tokens", "nowhere.jsonl"], 2, "nowhere.jsonl: no such file"),
    ([*AGAINST, "--tokens", "text.txt"], 2, "text.txt: expected a file of token ids"),
    ([*AGAINST, "--tokens", "native"], 2, "native: expected a file of token ids"),
    ([*AGAINST, "--text", "nowhere.txt"], 2, "nowhere.txt: no such file"),
    ([*AGAINST, "--text", "native"], 2, "native: no such file"),
    (["native", "--against", "other", "--text", "text.txt"], 3, "other: has no tokenizer.json"),
    (["native", "--against", "nowhere"], 3, "nowhere: no such folder"),
    (["nowhere", "--against", "native"], 3, "nowhere: no such folder"),
    (["native", "--against", "text.txt"], 3, "text.txt: is a file"),
    (["text.txt", "--against", "native"], 3, "text.txt: is a file"),
    (["wide", "--against", "native"], 2, "n_routed_experts is 4, expected 2"),
    (["native", "--reference-outputs", "nowhere.safetensors"], 2, "nowhere.safetensors: no such file"),
    (["native", "--reference-outputs", "native"], 2, "native: is a folder"),
    (["native", "--reference-outputs", "text.txt"], 3, "text.txt"),
    (["native", "--reference-outputs", "tokens.safetensors"], 3, "tokens.safetensors: has no tensor layer0.out"),
    (["wide", "--reference-outputs", "outputs.safetensors"], 2, "router_indices is I32"),
    (["--against", "native"], 2, "CANDIDATE"),
    ([*AGAINST, "--tolerance", "3"], 2, "--tolerance"),
]


@pytest.mark.parametrize(("arguments", "exit_code", "message"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_what_is_wrong_is_said(
    more: list[str], arguments: list[str], exit_code: int, message: str, folder: Path, capsys: Capture
) -> None:
    before = sorted(folder.rglob("*"))
    places = [str(folder / word) if word and (folder / word).exists() else word for word in arguments]
    assert main(["parity", *places, *more]) == exit_code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) <= 4
    assert sorted(folder.rglob("*")) == before


# One of each kind: that a checkpoint is read as carefully as by every command is shown for `inspect` and `convert`.
SOME = [
    CASES[0],
    CASES[4],
    SHARDS[0],
    SHARDS[5],
    TENSORS[0],
    TENSORS[6],
    INDEXES[0],
    CONFIGS[5],
    CONFIGS[10],
    replace(NUMBERS[0], names="layers.0.ffn.experts.1.w2.weight: scale[3, 5] is NaN"),
]


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
@pytest.mark.parametrize("side", ["candidate", "reference"])
def test_broken_checkpoints(side: str, case: Case, tmp_path: Path, capsys: Capture) -> None:
    """On either side, one clear message that names what is broken."""
    sound, broken = (
        write_small(tmp_path / "sound", "flash-base" if case.form == "base" else "flash"),
        tmp_path / "checkpoint",
    )
    shutil.copytree(sound, broken)
    case.break_it(broken)
    sides = [broken, sound] if side == "candidate" else [sound, broken]
    capsys.readouterr()
    assert main(["parity", str(sides[0]), "--against", str(sides[1]), *SHORT, "--json"]) == case.exit_code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert case.names in assert_one_clear_message(printed.err)


def changed_numbers(folder: Path, out: Path, name: str, number: float) -> Path:
    """A copy with every number of a BF16 or FP32 tensor replaced."""
    shutil.copytree(folder / "native", out)
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[open_checkpoint(out).tensors[name].dtype]

    def change(rows: Any) -> None:
        numbers = torch.full((rows.size // dtype.itemsize,), number).to(dtype)
        rows[:] = numbers.view(torch.uint8).numpy().reshape(rows.shape)

    edit(out, name, change)
    return out


# What overflows, whether the figures show it, and what a reference with it is told.
OVERFLOWS: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    (
        "layers.0.ffn_norm.weight",
        lambda found: found["layers"][0]["isolated_rel_err"],
        "layer 0: what the reference makes of 24 of 24 tokens is NaN or infinite",
    ),
    ("norm.weight", lambda found: found["kl_mean"], "the reference's logits of 24 of 24 tokens are NaN or infinite"),
]


@pytest.mark.parametrize(("name", "figure", "message"), OVERFLOWS, ids=[case[0] for case in OVERFLOWS])
def test_a_checkpoint_that_computes_nan(
    name: str,
    figure: Callable[[dict[str, Any]], object],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """Finite weights whose products overflow: the candidate is different; with such a reference nothing is compared."""
    broken = changed_numbers(folder, tmp_path / "broken", name, 3e38)
    found = run(folder, str(broken), "--against", "native", *SHORT, capsys=capsys, exit_code=1)
    assert found["verdict"] == "different"
    assert figure(found) is None, "JSON has no infinity"
    assert main(["parity", str(broken), "--against", str(broken), *SHORT, "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in assert_one_clear_message(printed.err)


def test_the_reference_says_which_tokens_are_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A candidate with a shorter context would be tested on prompts that leave paths out."""
    reference = named("tiny-base").folder
    short = with_config(reference, tmp_path / "short", max_position_embeddings=33)
    assert main(["parity", str(short), "--against", str(reference)]) == 2
    assert "has 296 tokens, expected 1 to 33" in capsys.readouterr().err


def test_no_earlier_report_is_taken_for_a_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other, report = named("tiny-base").folder, named("tiny-flash").folder, tmp_path / "report"
    arguments = ["--against", str(base), "--length", "20", "--report", str(report)]
    assert main(["parity", str(base), *arguments]) == 0
    assert sorted(path.name for path in report.iterdir()) == ["parity.json", "report.html"]
    assert main(["parity", str(base), *arguments]) == 5
    assert main(["parity", str(other), *arguments, "--overwrite"]) == 2
    assert not list(report.iterdir())
    capsys.readouterr()
