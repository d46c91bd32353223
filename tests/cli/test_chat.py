"""`v4quant encode` and `decode`: text, ids, the message, wrong files, and what goes to which stream."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chat.tokenizer_file import tokenizer_path
from v4quant.cli.main import main

MESSAGES = [
    {"role": "user", "content": "Weather in Oslo? </think>"},
    {"role": "assistant", "content": "c", "reasoning_content": "r"},
    {"role": "user", "content": "And now?"},
]
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">x\r\ny'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
EOS = "<｜end▁of▁sentence｜>"


@pytest.fixture
def messages(tmp_path: Path) -> Path:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps(MESSAGES), encoding="utf-8")
    return path


def file(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], exit_code: int, *arguments: object) -> str:
    assert main([*map(str, arguments)]) == exit_code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert printed.err.startswith("error: ")
    return printed.err


def test_text(messages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", str(messages), "--thinking"]) == 0
    printed = capsys.readouterr()
    assert printed.out == (
        "<｜begin▁of▁sentence｜><｜User｜>Weather in Oslo? </think><｜Assistant｜></think>c<｜end▁of▁sentence｜>"
        "<｜User｜>And now?<｜Assistant｜><think>\n"
    )
    assert printed.err.startswith("messages[0] spells </think>, which in this text looks like the real token")
    found = run_json(capsys, "encode", messages, "--thinking", "--keep-reasoning")
    assert list(found) == ["text", "control_ranges", "spelled_tokens"]
    assert "<｜Assistant｜><think>r</think>c" in found["text"]
    assert found["spelled_tokens"] == [{"message": 0, "token": "</think>"}]
    assert [found["text"][start:stop] for start, stop in found["control_ranges"]][:3] == [
        "<｜begin▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
    ]
    assert run_json(capsys, "encode", messages, "--effort", "max", "--encoder", "preview")["text"].count("Effort") == 0


def test_ids_there_and_back(messages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "encode", messages, "--tokenizer", tokenizer_path().parent)
    assert list(found) == ["text", "control_ranges", "spelled_tokens", "ids", "spans"]
    assert found["ids"].count(128_822) == 2, "the user's is none"
    assert found["spans"][0] == {"start": 0, "stop": 1, "part": "bos", "message": -1}
    assert main(["encode", str(messages), "--tokenizer", str(tokenizer_path())]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == found["ids"]
    assert printed.err == ""
    ids = found["ids"][found["ids"].index(128_822) + 1 :]
    completion = file(tmp_path, json.dumps(ids[: ids.index(1) + 1]))
    assert run_json(capsys, "decode", completion, "--tokenizer", tokenizer_path())["content"] == "c"


def test_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for end in ("", EOS, f"{EOS}\n", f"{EOS}\r\n", "\n"):
        found = run_json(capsys, "decode", file(tmp_path, f"r</think>c{CALL}{end}"), "--thinking")
        assert found == {
            "role": "assistant",
            "content": "c",
            "reasoning_content": "r",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": "x\\r\\ny"}'}}],
        }
    assert main(["decode", str(file(tmp_path, f"r</think>c{CALL}")), "--thinking"]) == 0
    assert capsys.readouterr().out == 'reasoning: r\ncontent: c\ncall: f {"a": "x\\r\\ny"}\n'
    assert main(["decode", str(file(tmp_path, f"\x1b[2J{EOS}"))]) == 0
    assert capsys.readouterr().out == "content: \\x1b[2J\n"


def test_completions_that_are_not_well_formed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, 1, "decode", file(tmp_path, "r</think>c"))
    assert "does not end in" in message
    assert "needs --thinking" in message
    assert "goes on after its end" in refusal(capsys, 1, "decode", file(tmp_path, f"c{EOS}\n\n"))
    assert "has no </think>" in refusal(capsys, 1, "decode", file(tmp_path, f"c{EOS}"), "--thinking")


def test_wrong_files(messages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot read: No such file" in refusal(capsys, 2, "encode", tmp_path / "missing.json")
    assert "cannot read: Is a directory" in refusal(capsys, 2, "decode", tmp_path)
    assert "File name too long" in refusal(capsys, 2, "decode", "a" * 300)
    assert "is not valid JSON" in refusal(capsys, 2, "encode", file(tmp_path, "hello"))
    assert "is not UTF-8 at byte 1" in refusal(capsys, 2, "decode", file(tmp_path, b"a\xff"))
    assert "key 'a' appears twice" in refusal(capsys, 2, "encode", file(tmp_path, '[{"a": 1, "a": 2}]'))
    wrong = file(tmp_path, '[{"role": "user", "content": "\\ud800"}]')
    assert "messages[0].content holds half a surrogate pair" in refusal(capsys, 2, "encode", wrong)
    assert "effort is 'hard'" in refusal(capsys, 2, "encode", messages, "--effort", "hard")
    tokenizer = ["--tokenizer", tokenizer_path()]
    assert "expected a JSON array of token ids" in refusal(capsys, 2, "decode", messages, *tokenizer)
    assert "token 0 is 129280" in refusal(capsys, 2, "decode", file(tmp_path, "[129280]"), *tokenizer)
    missing = refusal(capsys, 3, "encode", messages, "--tokenizer", tmp_path)
    assert f"{tmp_path}/tokenizer.json: cannot read" in missing
    not_v4 = refusal(capsys, 3, "encode", messages, "--tokenizer", tokenizer_path().with_name("tokenizer_config.json"))
    assert "it is not V4's tokenizer" in not_v4


def test_a_byte_order_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marked = file(tmp_path, b"\xef\xbb\xbf" + json.dumps(MESSAGES).encode())
    assert "And now?" in run_json(capsys, "encode", marked)["text"]
