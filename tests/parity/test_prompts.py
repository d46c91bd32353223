"""Prompts built for every release, and files of prompts as tired people make them."""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from v4quant.checkpoint.files import Files
from v4quant.config import V4Config
from v4quant.errors import CheckpointError, UsageError, V4QuantError
from v4quant.parity.prompts import DECODE_STEPS, Prompts, built_prompts, needed_tokens, read_prompts, text_prompts
from v4quant.testing.releases import Like, synth_config

CSA, HCA = 4, 128


def config_of(like: str, **options: Any) -> V4Config:
    return V4Config.from_json(synth_config(like, **options)[0], like)


TINY = config_of("flash", tiny=True)
ALL = [config_of(like, tiny=tiny) for like in Like for tiny in (False, True)]
every_config = pytest.mark.parametrize("config", ALL, ids=[f"{like}{tiny}" for like in Like for tiny in ("", "-tiny")])


@every_config
def test_built_prompts_let_every_path_fire(config: V4Config) -> None:
    prompts = built_prompts(config, None, None)
    long, short = (len(ids) for ids in prompts.ids)
    assert (long - DECODE_STEPS) // CSA - config.index_topk >= 64, "256 tokens for which the indexer has to choose"
    assert long - DECODE_STEPS >= 2 * config.sliding_window, "the window slides once round"
    assert (long - DECODE_STEPS) // HCA >= 2
    assert 0 < short < config.sliding_window
    assert sum(len(ids) for ids in prompts.ids) == needed_tokens(config)
    assert prompts.sizes == (long - DECODE_STEPS, 1)
    assert prompts.mtp_lengths == [long - DECODE_STEPS - 1, short - 1]


def test_built_prompts_are_no_longer_than_needed() -> None:
    """A run takes hours on a small machine; a model without CSA or HCA needs fewer tokens."""
    assert needed_tokens(config_of("flash")) == 4 * 512 + 256 + 8 + 48
    assert needed_tokens(config_of("pro")) == 4 * 1024 + 256 + 8 + 48
    assert needed_tokens(config_of("flash", layers=2, mtp=False)) == 2 * 128 + 8 + 48
    assert needed_tokens(config_of("pro", layers=2, tiny=True, mtp=False)) == 2 * HCA + 8 + 16


@every_config
def test_built_prompts_spread_over_the_vocabulary_and_repeat_pieces(config: V4Config) -> None:
    long = built_prompts(config, None, None).ids[0]
    assert 0 <= int(long.min()) < config.vocab_size // 50
    assert config.vocab_size * 49 // 50 < int(long.max()) < config.vocab_size
    pieces = long.unfold(0, 8, 1)
    first = {tuple(piece) for piece in pieces[: len(long) // 2 - 8].tolist()}
    again = sum(tuple(piece) in first for piece in pieces[len(long) // 2 :].tolist())
    assert again > len(long) // 16, "the second half repeats pieces of the first"
    if len(long) < config.vocab_size:
        assert len(torch.unique(long)) > len(long) // 2, "and most of it is new"


def test_built_prompts_are_always_the_same() -> None:
    torch.manual_seed(1)
    one = built_prompts(TINY, None, None)
    torch.manual_seed(2)
    other = built_prompts(TINY, None, None)
    assert all(torch.equal(a, b) for a, b in zip(one.ids, other.ids, strict=True))
    assert one.ids[0][:8].tolist() == [122, 174, 439, 197, 385, 360, 87, 456], "as in reports that were made before"


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 400))
def test_as_many_tokens_as_asked_for(length: int) -> None:
    prompts = built_prompts(TINY, length, None)
    assert sum(len(ids) for ids in prompts.ids) == length
    assert len(prompts.ids) == (2 if length >= 48 else 1)
    assert 1 <= prompts.sizes[0] <= len(prompts.ids[0])
    assert all(0 <= int(ids.min()) <= int(ids.max()) < TINY.vocab_size for ids in prompts.ids)


def test_a_model_of_a_short_context() -> None:
    config = V4Config.from_json(synth_config("flash", tiny=True)[0] | {"max_position_embeddings": 100}, "test")
    assert [len(ids) for ids in built_prompts(config, None, None).ids] == [100, 16]
    with pytest.raises(UsageError, match="200 tokens are to be built, expected at most 100"):
        built_prompts(config, 200, None)


@settings(max_examples=200, deadline=None)
@given(longest=st.integers(1, 5000))
def test_other_chunks_end_within_windows_and_entries(longest: int) -> None:
    """Three pieces that hold everything; where the prompt is long enough, no seam lies where an entry ends."""
    prompts = Prompts.of([torch.zeros(longest, dtype=torch.int64)], None, TINY, "test")
    first, second, rest = prompts.other_sizes
    assert min(first, second, rest) >= 1
    assert first + second + rest >= longest
    if longest >= 8:
        assert first + second < longest
        assert first % CSA and (first + second) % CSA
        assert first != second


@pytest.mark.parametrize(
    ("longest", "prefill", "sizes"),
    [(1, None, 1), (3, None, 3), (4, None, 3), (31, None, 24), (32, None, 24), (400, None, 392), (5, 5, 5), (5, 1, 1)],
)
def test_prefill(longest: int, prefill: int | None, sizes: int) -> None:
    ids = [torch.zeros(1, dtype=torch.int64), torch.zeros(longest, dtype=torch.int64)]
    assert Prompts.of(ids, prefill, TINY, "test").sizes == (sizes, 1)


@pytest.mark.parametrize("prefill", [0, -1, 6])
def test_wrong_prefill(prefill: int) -> None:
    with pytest.raises(UsageError, match=f"--prefill is {prefill}, expected 1 to the 5 tokens of the longest prompt"):
        Prompts.of([torch.zeros(5, dtype=torch.int64)], prefill, TINY, "test")


def test_mtp_predicts_from_all_but_the_last_of_a_prefill() -> None:
    ids = [torch.zeros(length, dtype=torch.int64) for length in (1, 2, 7, 9)]
    assert Prompts.of(ids, 7, TINY, "test").mtp_lengths == [0, 1, 6, 6]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


SOUND = [
    ("lists", "[1, 2, 3]\n[4]\n"),
    ("objects", '{"input_ids": [1, 2, 3], "text": "a"}\n{"input_ids": [4]}'),
    ("blank lines", "\n\n[1, 2, 3]\n   \n\t\n[4]\n\n"),
    ("ends of lines of Windows", "[1, 2, 3]\r\n\r\n[4]\r\n"),
    ("a byte order mark", b"\xef\xbb\xbf[1, 2, 3]\n[4]\n"),
    ("ends of lines within text", '{"text": "a\u2028b\u0085c\u000b", "input_ids": [1, 2, 3]}\n[4]'.replace("\v", "")),
    ("spaces", "  [ 1,2,\t3 ]  \n [4] "),
]


@pytest.mark.parametrize("content", [content for _, content in SOUND], ids=[name for name, _ in SOUND])
def test_jsonl(content: str | bytes, tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path / "tokens.jsonl", content), TINY, None)
    assert [ids.tolist() for ids in prompts.ids] == [[1, 2, 3], [4]]
    assert all(ids.dtype == torch.int64 for ids in prompts.ids)
    assert prompts.source == str(tmp_path / "tokens.jsonl")


WRONG_JSONL = [
    ("an empty file", "", "tokens.jsonl: holds no prompt"),
    ("blank lines only", "\n  \n", "tokens.jsonl: holds no prompt"),
    ("an empty list", "[]", "tokens.jsonl: has 0 tokens, expected 1 to"),
    ("an empty list among others", "[1]\n[]", "tokens.jsonl: prompt 1: has 0 tokens"),
    ("floats", "[1.0, 2]", "line 1: expected a list of token ids"),
    ("a negative id", "[1]\n\n[-1]", "line 3: expected a list of token ids"),
    ("an id beyond the vocabulary", "[1]\n[4, 512]", "prompt 1: token 1 is 512, expected 0 to 511"),
    ("an id of 64 bits", "[9223372036854775808]", "line 1: expected a list of token ids"),
    ("an id of a thousand digits", f"[{'1' * 1000}]", "line 1: is not JSON: an integer of 1000 digits"),
    ("true", "[true]", "line 1: expected a list of token ids"),
    ("words", '["a"]', "line 1: expected a list of token ids"),
    ("nested lists", "[[1, 2], [3]]", "line 1: expected a list of token ids"),
    ("lists nested without end", "[" * 100_000, "line 1: is not JSON"),
    ("a number", "7", "line 1: expected a list of token ids"),
    ("null", "null", "line 1: expected a list of token ids"),
    ("an object without input_ids", '{"ids": [1]}', "line 1: expected a list of token ids"),
    ("input_ids that are no list", '{"input_ids": 1}', "line 1: expected a list of token ids"),
    ("a key twice", '{"input_ids": [1], "input_ids": [2]}', "line 1: is not JSON: key 'input_ids' appears twice"),
    ("text", "once upon a time", "line 1: is not JSON"),
    ("NaN", "[NaN]", "line 1: is not JSON"),
    ("one array over lines", "[\n 1,\n 2\n]", "line 1: is not JSON"),
    ("bytes that are no UTF-8", b"[1]\n\xff\xfe", "cannot be read as UTF-8 text"),
    ("UTF-16", "[1]".encode("utf-16"), "cannot be read as UTF-8 text"),
]


@pytest.mark.parametrize(
    ("content", "message"), [case[1:] for case in WRONG_JSONL], ids=[case[0] for case in WRONG_JSONL]
)
def test_wrong_jsonl(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_prompts(written(tmp_path / "tokens.jsonl", content), TINY, None)
    assert message in str(caught.value)
    assert str(tmp_path / "tokens.jsonl") in str(caught.value)


def test_a_prompt_longer_than_the_model_takes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has 1,048,577 tokens, expected 1 to 1,048,576"):
        read_prompts(written(tmp_path / "tokens.jsonl", json.dumps([0] * (2**20 + 1))), TINY, None)


@pytest.mark.parametrize("name", ["tokens.jsonl", "text.txt"])
def test_a_huge_file_is_not_read(name: str, tmp_path: Path) -> None:
    """It is sparse: read, it would fill the memory."""
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match="has 1,099,511,627,776 bytes, expected at most 268,435,456"):
        if name == "text.txt":
            text_prompts(tmp_path / name, with_tokenizer(tmp_path), TINY, None, None)
        else:
            read_prompts(tmp_path / name, TINY, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.jsonl", "no such file, expected token ids"),
        ("nowhere.safetensors", "no such file"),
        ("nowhere.json", r"expected a file of token ids, \*.safetensors or \*.jsonl"),
        ("folder.jsonl", "expected token ids, one JSON list a line"),
        ("folder.safetensors", "is a folder"),
    ],
)
def test_no_such_file(name: str, message: str, tmp_path: Path) -> None:
    for folder in ("folder.jsonl", "folder.safetensors"):
        (tmp_path / folder).mkdir()
    with pytest.raises(UsageError, match=message):
        read_prompts(tmp_path / name, TINY, None)


def saved(path: Path, ids: torch.Tensor, name: str = "input_ids") -> Path:
    safetensors.torch.save_file({name: ids}, path)
    return path


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (torch.tensor([1, 2, 3]), [[1, 2, 3]]),
        (torch.tensor([1, 2, 3], dtype=torch.int32), [[1, 2, 3]]),
        (torch.tensor([[1, 2, 3], [4, 5, 6]]), [[1, 2, 3], [4, 5, 6]]),
        (torch.tensor([[7]]), [[7]]),
    ],
)
def test_safetensors(ids: torch.Tensor, expected: list[list[int]], tmp_path: Path) -> None:
    prompts = read_prompts(saved(tmp_path / "tokens.safetensors", ids), TINY, None)
    assert [ids.tolist() for ids in prompts.ids] == expected
    assert all(ids.dtype == torch.int64 for ids in prompts.ids)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(2, 2, 2, dtype=torch.int64), UsageError, r"input_ids has shape \[2, 2, 2\], expected \[T\] or"),
        (torch.tensor(3), UsageError, r"input_ids has shape \[\], expected \[T\] or"),
        (torch.zeros(0, dtype=torch.int64), UsageError, "holds no prompt"),
        (torch.zeros(3, 0, dtype=torch.int64), UsageError, "holds no prompt"),
        (torch.tensor([1, -1]), UsageError, "token 1 is -1, expected 0 to 511"),
        (torch.tensor([[1, 2], [3, 512]]), UsageError, "prompt 1: token 1 is 512"),
        (torch.tensor([2**40]), UsageError, "token 0 is 1099511627776"),
        (torch.tensor([1.0]), CheckpointError, "input_ids is F32, expected I64 or I32"),
        (torch.tensor([1], dtype=torch.uint8), CheckpointError, "input_ids is U8, expected"),
    ],
)
def test_wrong_safetensors(ids: torch.Tensor, error: type[V4QuantError], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        read_prompts(saved(tmp_path / "tokens.safetensors", ids), TINY, None)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: saved(path, torch.tensor([1]), "tokens"), "has no tensor input_ids, but tokens"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated"),
        (lambda path: path.write_bytes(b""), "has 0 bytes"),
        (lambda path: path.write_bytes(b"[1, 2, 3]\n"), "header"),
    ],
)
def test_damaged_safetensors(break_it: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "tokens.safetensors", torch.tensor([1, 2]))
    break_it(path)
    with pytest.raises(CheckpointError, match=message):
        read_prompts(path, TINY, None)


def with_tokenizer(folder: Path, unknown: str | None = "?", **words: int) -> Files:
    """Files of a folder with a tokenizer of words in it."""
    words = words or {"once": 7, "upon": 8, "a": 9, "time": 10, "?": 11}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return Files(folder)


@pytest.mark.parametrize(
    ("length", "prefill", "ids", "sizes"),
    [
        (None, None, [7, 8, 9, 10], (3, 1)),
        (3, None, [7, 8, 9], (3, 1)),
        (9, 2, [7, 8, 9, 10], (2, 1)),
    ],
)
def test_text(length: int | None, prefill: int | None, ids: list[int], sizes: tuple[int, int], tmp_path: Path) -> None:
    files = with_tokenizer(tmp_path)
    for content in (b"once upon a time", b"\xef\xbb\xbfonce upon\r\na time\r\n"):
        prompts = text_prompts(written(tmp_path / "text.txt", content), files, TINY, length, prefill)
        assert [one.tolist() for one in prompts.ids] == [ids]
        assert prompts.sizes == sizes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "text.txt: has 0 tokens, expected 1 to"),
        (" \n\n ", "text.txt: has 0 tokens, expected 1 to"),
        (b"once \xff", "text.txt: cannot be read as UTF-8 text"),
        ("x", "token 0 is 600, expected 0 to 511"),
    ],
)
def test_wrong_text(content: str | bytes, message: str, tmp_path: Path) -> None:
    files = with_tokenizer(tmp_path, once=7, x=600)
    with pytest.raises(UsageError, match=message):
        text_prompts(written(tmp_path / "text.txt", content), files, TINY, None, None)


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file, expected a text in UTF-8"):
        text_prompts(tmp_path / "text.txt", with_tokenizer(tmp_path), TINY, None, None)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json, which --text needs"):
        text_prompts(written(tmp_path / "text.txt", "once"), Files(tmp_path), TINY, None, None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"model": 3}',
        b'{"model": {"type": "WordLevel", "vocab": {"a": -1}}}',
        b"{" * 9,
    ],
)
def test_a_damaged_tokenizer(content: bytes, tmp_path: Path) -> None:
    written(tmp_path / "tokenizer.json", content)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: cannot be read"):
        text_prompts(written(tmp_path / "text.txt", "once"), Files(tmp_path), TINY, None, None)


def test_a_tokenizer_that_cannot_encode_the_text(tmp_path: Path) -> None:
    """It has no token for unknown words."""
    files = with_tokenizer(tmp_path, None, once=7)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: cannot encode .*text.txt: "):
        text_prompts(written(tmp_path / "text.txt", "twice"), files, TINY, None, None)


def test_without_the_tokenizers_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = with_tokenizer(tmp_path)
    own = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return own(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match="--text needs the package tokenizers"):
        text_prompts(written(tmp_path / "text.txt", "once"), files, TINY, None, None)
