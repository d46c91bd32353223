"""`v4quant parity --messages`: conversations with tools through both checkpoints, and what a tired person types."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.chat.test_answer import CALL, ids_of
from tests.chat.tokenizer_file import tokenizer_path
from tests.cli.test_chat import refusal
from v4quant.chat.tokens import EOS, IDS
from v4quant.cli.main import main
from v4quant.model.transformer import Transformer
from v4quant.parity import continuations
from v4quant.testing.releases import Vocab, synth_config
from v4quant.testing.synth import write_checkpoint

Capture = pytest.CaptureFixture[str]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
ASKED = [{"role": "system", "content": ""}, {"role": "user", "content": "Weather in Oslo?"}]
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "cold"}
ANSWER = {"role": "assistant", "content": "It is cold.", "reasoning_content": "hm"}
LINES = [
    {"messages": [*ASKED, CALLED, RESULT, ANSWER], "tools": TOOLS},
    [{"role": "user", "content": "hi"}],
    [{"role": "assistant", "content": "Welcome."}],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer with the releases' tokens, the same in fp8, one with other weights; three conversations."""
    folder = tmp_path_factory.mktemp("messages")
    model = synth_config("flash", tiny=True, vocab=Vocab.FULL, layers=1, experts=2, mtp=False)
    write_checkpoint(folder / "native", *model)
    write_checkpoint(folder / "other", *model, 1)
    (folder / "short.jsonl").write_text(json.dumps(LINES[1]))
    shutil.copy(tokenizer_path(), folder / "native" / "tokenizer.json")
    assert main(["convert", str(folder / "native"), str(folder / "fp8"), "--to", "fp8"]) == 0
    (folder / "talks.jsonl").write_text(
        "\n".join(json.dumps(line) for line in LINES[:2]) + "\n\n" + json.dumps(LINES[2])
    )
    return folder


def command(folder: Path, *more: str, candidate: str = "fp8", talks: str = "talks") -> list[str]:
    sides = [str(folder / candidate), "--against", str(folder / "native")]
    return ["parity", *sides, "--messages", str(folder / f"{talks}.jsonl"), *more]


def test_a_conversion_says_the_same(folder: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert main([*command(folder, "--continuation", "3"), "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["verdict"] == "identical"
    assert result["evidence"]["tokens_from"] == f"{folder}/talks.jsonl, chat mode"
    assert "holds reasoning, which is left out; to keep it: --thinking" in printed.err
    found = result["conversations"]
    assert list(found) == ["assistant", "tool_calls", "each", "continuations"]
    assert [own["name"] for own in found["each"]] == ["line 1", "line 2", "line 4"]
    assert [own["tokens"] for own in found["each"]] == [len(ids) for ids in result["evidence"]["prompts"]]
    call, answer = len(ids_of(CALL)), len(ids_of("It is cold."))
    assert found["tool_calls"]["tokens"] == found["each"][0]["tool_calls"]["tokens"] == call
    assert found["each"][0]["assistant"]["tokens"] == call + answer + 2, "and the ends of two sentences"
    assert found["each"][1] | {"tokens": 0} == {"name": "line 2", "tokens": 0, "assistant": None, "tool_calls": None}
    assert found["each"][2]["assistant"]["tokens"] == len(ids_of("Welcome.")) + 1
    assert (found["assistant"]["kl_max"], found["assistant"]["top1"]) == (0.0, 1.0)
    assert found["assistant"]["noise"].keys() == {"kl_mean", "kl_max", "top1"}
    answers = found["continuations"]
    assert (answers["max_tokens"], answers["written"], answers["alike"]) == (3, 2, 2)
    assert [own["name"] for own in answers["each"]] == ["line 1", "line 2"], "line 4 asks for nothing"
    assert answers["each"][0]["reference"]["tokens"] == 3


def test_what_is_answered_is_the_conversation_before_its_last_answer(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models are made to call the tool; the prompts are those of `encode`."""
    asked: list[list[int]] = []

    def generate(_: Transformer, prompt: Any, sampling: Any, max_tokens: int, stop: int) -> Any:
        from v4quant.model.generation import Step

        asked.append(prompt.tolist())
        assert (sampling.temperature, max_tokens, stop) == (0.0, 64, IDS[EOS])
        return (Step(token, None) for token in ids_of(f"hm</think>{CALL}{EOS}"))  # type: ignore[arg-type]

    monkeypatch.setattr(continuations, "generate", generate)
    capsys.readouterr()
    assert main([*command(folder, "--thinking", "--report", str(folder / "report")), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["conversations"]["continuations"]
    assert found["calls"] == {"same": 2, "different": 0, "none": 0, "unknown": 0}
    assert found["each"][0]["candidate"]["calls"] == [{"name": "f", "arguments": '{"a": "x"}'}]
    assert asked[:2] == asked[2:]
    path = folder / "cut.json"
    path.write_text(json.dumps({"messages": [*ASKED, CALLED, RESULT], "tools": TOOLS}))
    assert main(["encode", str(path), "--thinking", "--tokenizer", str(tokenizer_path()), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == asked[0]
    page = (folder / "report" / "report.html").read_text()
    assert 'id="conversations"' in page and "✓ the same" in page
    assert json.loads((folder / "report" / "parity.json").read_text())["conversations"]["continuations"] == found


def test_in_words(folder: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert main(command(folder, "--continuation", "2", candidate="other")) == 1
    said = capsys.readouterr().out
    assert said.startswith("DIFFERENT: ")
    assert "  assistant, " in said and "  tool calls, " in said and "(noise " in said
    assert "greedy answers of up to 2 tokens: 0 of 2 alike; tool calls: unknown 2" in said
    assert "line 1: they part at token 0, where the reference prefers its own by " in said


def test_answers_that_are_not_written(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    capsys.readouterr()
    assert main(command(folder, "--continuation", "0", talks="short")) == 0
    said = capsys.readouterr().out
    assert "assistant: none in these conversations" in said
    assert "greedy answers: skipped, as none were asked for" in said
    monkeypatch.setattr(continuations, "free_bytes", lambda _: 10**6)
    assert main(command(folder, talks="short")) == 0
    said = capsys.readouterr().out
    assert "greedy answers: skipped, as the reference takes " in said and "is a pass over all layers" in said


def test_a_sharded_candidate(folder: Path, capsys: Capture) -> None:
    assert main(["shard", str(folder / "native"), str(folder / "tp2"), "--tp", "2"]) == 0
    capsys.readouterr()
    assert main(command(folder, candidate="tp2", talks="short")) == 0
    said = capsys.readouterr().out
    assert "greedy answers: skipped, as the candidate is no whole checkpoint, which writing answers takes" in said


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tokens", "x.jsonl"], "--tokens and --messages are both given, expected one"),
        (["--text", "x.txt"], "--text and --messages are both given, expected one"),
        (["--length", "9"], "--length is given with --messages"),
        (["--continuation", "-1"], "--continuation"),
        (["--prefill", "5000"], "--prefill is 5000"),
    ],
)
def test_options_that_do_not_fit(more: list[str], says: str, folder: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert main(command(folder, *more)) == 2
    assert says in capsys.readouterr().err


def test_options_without_messages(folder: Path, capsys: Capture) -> None:
    sides = ["parity", folder / "fp8", "--against", folder / "native"]
    capsys.readouterr()
    assert "--thinking is given without --messages" in refusal(capsys, 2, *sides, "--thinking")
    assert "--continuation is given without --messages" in refusal(capsys, 2, *sides, "--continuation", "0")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[{"role": "user", "content": "a"}]\n[', "line 2: is not valid JSON"),
        ('\n[{"role": "user", "content": 1}]', "line 2: messages[0].content is 1, expected text"),
        ('{"messages": [], "model": "m"}', "line 1: key 'model', expected an array of messages"),
        ("", "holds no prompt, expected one or more"),
    ],
)
def test_files_that_hold_no_conversations(
    content: str, says: str, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(content)
    capsys.readouterr()
    message = refusal(capsys, 2, "parity", folder / "fp8", "--against", folder / "native", "--messages", path)
    assert says in message and str(path) in message


def test_no_tokenizer(folder: Path, capsys: Capture) -> None:
    capsys.readouterr()
    sides = ["parity", folder / "native", "--against", folder / "other"]
    assert "has no tokenizer.json, which --messages needs" in refusal(
        capsys, 3, *sides, "--messages", folder / "talks.jsonl"
    )
