"""`v4quant generate`: the whole chain with the releases' tokenizer, and what a tired person types."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chat.test_answer import CALL, ids_of
from tests.chat.tokenizer_file import tokenizer_path, v4_tokenizer
from tests.checkpoint.conversion import write_small
from tests.cli.test_chat import refusal
from v4quant.chat.tokens import EOS
from v4quant.cli.main import main
from v4quant.model import resident
from v4quant.model.transformer import Transformer

Capture = pytest.CaptureFixture[str]
MESSAGES = [
    {"role": "system", "content": "", "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"role": "user", "content": "Weather in Oslo?"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with all tokens of the release, the release's tokenizer, and a conversation."""
    folder = tmp_path_factory.mktemp("generate")
    assert main(["synth", str(folder / "model"), "--like", "flash", "--tiny", "--vocab", "full"]) == 0
    shutil.copy(tokenizer_path(), folder / "model" / "tokenizer.json")
    (folder / "messages.json").write_text(json.dumps(MESSAGES))
    return folder


def command(folder: Path, *more: str) -> list[str]:
    return ["generate", str(folder / "model"), str(folder / "messages.json"), *more]


def generated(folder: Path, *more: str, capsys: Capture) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*command(folder, *more), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def script(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Have the model say these tokens."""
    coming = iter(ids)

    def logits(model: Transformer, streams: torch.Tensor) -> torch.Tensor:
        assert len(streams) == 1, "of the last token alone"
        wanted = torch.zeros(1, model.config.vocab_size)
        wanted[0, next(coming)] = 20.0
        return wanted

    monkeypatch.setattr(Transformer, "logits", logits)


def test_text_through_the_whole_chain(folder: Path, capsys: Capture) -> None:
    found = generated(folder, "--max-tokens", "5", capsys=capsys)
    assert list(found) == [
        *("text", "ids", "message", "message_error", "finish_reason", "prompt_tokens", "tokens", "seconds"),
        *("prefill_seconds", "load_seconds", "tokens_per_second"),
    ]
    assert (found["finish_reason"], found["tokens"], len(found["ids"])) == ("length", 5, 5)
    assert found["text"] == "".join(text for text, _ in v4_tokenizer().segments(found["ids"])) != ""
    assert found["message"] is None and "it was cut off" in found["message_error"]
    assert 0 < found["prefill_seconds"] < found["seconds"]
    assert found["tokens_per_second"] == pytest.approx(4 / (found["seconds"] - found["prefill_seconds"]))
    assert main(["encode", str(folder / "messages.json"), "--tokenizer", str(tokenizer_path()), "--json"]) == 0
    assert found["prompt_tokens"] == len(json.loads(capsys.readouterr().out)["ids"])
    assert main(command(folder, "--max-tokens", "5")) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{found['text']}\n", "greedy says the same again"
    assert printed.err.startswith("memory: ")
    assert "no message: the completion, at character 0, does not end in" in printed.err
    assert "ended by: length" in printed.err


def test_a_seed_decides(folder: Path, capsys: Capture) -> None:
    def ids(seed: str, top_p: str = "0.9") -> Any:
        more = ["--max-tokens", "3", "--temperature", "1", "--top-p", top_p, "--seed", seed]
        return generated(folder, *more, capsys=capsys)["ids"]

    assert ids("1") == ids("1") != ids("2")
    assert ids("1", "1e-9") == generated(folder, "--max-tokens", "3", capsys=capsys)["ids"]


def test_tool_calls(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"hm</think>Let me see 𓀀.{CALL}"
    script(monkeypatch, ids_of(f"{text}{EOS}"))
    assert main(command(folder, "--thinking")) == 0
    printed = capsys.readouterr()
    assert printed.out == f'{text}\ncall: f {{"a": "x"}}\n'
    assert "ended by: stop" in printed.err and "no message" not in printed.err
    script(monkeypatch, ids_of(f"{text}{EOS}"))
    found = generated(folder, "--thinking", capsys=capsys)
    assert (found["text"], found["finish_reason"], found["message_error"]) == (text, "stop", None)
    assert found["message"] == {
        "role": "assistant",
        "content": "Let me see 𓀀.",
        "reasoning_content": "hm",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}}],
    }
    script(monkeypatch, ids_of(f"\x1b[2J{EOS}"))
    assert main(command(folder)) == 0
    assert capsys.readouterr().out == "\\x1b[2J\n"


def test_interrupted_between_tokens(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of("one two three")

    def interrupt() -> Any:
        yield from ids[:2]
        raise KeyboardInterrupt

    script(monkeypatch, interrupt())
    assert main([*command(folder), "--json"]) == 130
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["finish_reason"], found["ids"], found["text"]) == ("interrupted", ids[:2], "one two")
    assert "error: interrupted after 2 tokens" in printed.err


def test_ctrl_c_keeps_what_came(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "v4quant", *command(folder, "--max-tokens", "100000")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert process.stdout is not None
        first = process.stdout.read(1)  # a token has come
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert first and rest.endswith("\n")
    assert "ended by: interrupted" in errors
    assert errors.splitlines()[-1].startswith("error: interrupted after ")


def test_what_does_not_fit(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "free_bytes", lambda _: 10**8)
    message = refusal(capsys, 2, *command(folder))
    assert f"{folder}/model: in memory it takes" in message and "and 100.00 MB is free" in message
    assert "v4quant parity and v4quant reference" in message
    monkeypatch.setattr(resident, "free_bytes", lambda _: None)
    assert main(command(folder, "--max-tokens", "1")) == 0
    assert "free: not known" in capsys.readouterr().err


def test_tokenizers_that_do_not_fit(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    small = write_small(tmp_path / "small")
    arguments = ["generate", small, folder / "messages.json"]
    assert "has no tokenizer.json, which text needs" in refusal(capsys, 3, *arguments)
    message = refusal(capsys, 3, *arguments, "--tokenizer", folder / "model")
    assert "gives ids up to 129,279, expected less than vocab_size 512" in message
    assert "--vocab full" in message
    (small / "tokenizer.json").write_text("{}")
    assert "it is not V4's tokenizer" in refusal(capsys, 3, *arguments)
    assert "cannot read: No such file" in refusal(capsys, 3, *arguments, "--tokenizer", tmp_path / "missing")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("[", "is not valid JSON"),
        ("[]", "expected an array of at least one message"),
        ('[{"role": "user", "content": 3}]', "messages[0].content is 3, expected text"),
        ('[{"role": "user"}, {"role": "assistant", "content": "a"}]', "ends in eos, expected something to answer"),
    ],
)
def test_messages_that_are_none(messages: str, says: str, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(messages)
    message = refusal(capsys, 2, "generate", folder / "model", path)
    assert says in message and str(path) in message


def test_a_prompt_that_is_too_long(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    short = shutil.copytree(folder / "model", tmp_path / "short", copy_function=os.link)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").unlink()
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    message = refusal(capsys, 2, "generate", short, folder / "messages.json")
    assert f"{folder}/messages.json: has " in message and "tokens, expected 1 to 20" in message


def test_a_damaged_checkpoint(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = shutil.copytree(folder / "model", tmp_path / "copy", copy_function=os.link)
    (copy / "model-00003-of-00008.safetensors").unlink()
    assert "problems:" in refusal(capsys, 3, "generate", copy, folder / "messages.json")


@pytest.mark.parametrize(
    "more",
    [
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-p", "0"],
        ["--seed", "-1"],
        ["--max-tokens", "0"],
        ["--effort", "hard"],
        ["--device", "tpu"],
        ["--encoder", "old"],
    ],
)
def test_options_out_of_range(more: list[str], folder: Path, capsys: Capture) -> None:
    assert main(command(folder, *more)) == 2
    printed = capsys.readouterr()
    assert (
        printed.out == ""
        and "Traceback" not in printed.err
        and more[0].strip("-").replace("-", "") in printed.err.replace("-", "")
    )
