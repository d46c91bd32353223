"""The index: written in the releases' style, read as hostile input, nothing in it ever opened as a path."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4quant.checkpoint import index as index_module
from v4quant.checkpoint.index import Index, build_index, parse_index
from v4quant.errors import CheckpointError

SHARD = "model-00001-of-00002.safetensors"


def test_written_as_the_releases_have_it() -> None:
    """Indented by two, in the given order, without a final newline."""
    assert build_index({"norm.weight": SHARD, "embed.weight": SHARD}, 1_234) == (
        b"{\n"
        b'  "metadata": {\n    "total_size": 1234\n  },\n'
        b'  "weight_map": {\n'
        b'    "norm.weight": "model-00001-of-00002.safetensors",\n'
        b'    "embed.weight": "model-00001-of-00002.safetensors"\n'
        b"  }\n"
        b"}"
    )


def test_written_index_of_nothing() -> None:
    assert parse_index(build_index({}, 0), "index") == Index(0, {})


@settings(deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=5), st.integers(0, 2**63))
def test_what_was_written_is_read_back_in_order(weight_map: dict[str, str], total_size: int) -> None:
    found = parse_index(build_index(weight_map, total_size), "index")
    assert found == Index(total_size, weight_map)
    assert list(found.weight_map) == list(weight_map)


@pytest.mark.parametrize(
    ("metadata", "total_size"),
    [
        ({"metadata": {"total_size": 7}}, 7),
        ({"metadata": {"total_size": 7.0}}, 7),  # transformers has written it so
        ({"metadata": {"total_size": 1e12, "total_parameters": 3}}, 10**12),
        ({"metadata": {"total_size": None}}, None),
        ({"metadata": {}}, None),
        ({"metadata": None}, None),
        ({"metadata": "none"}, None),
        ({}, None),
    ],
)
def test_total_size_as_others_write_it(metadata: dict[str, Any], total_size: int | None) -> None:
    text = json.dumps(metadata | {"weight_map": {"a": SHARD}, "more": [1]}).encode()
    assert parse_index(text, "index") == Index(total_size, {"a": SHARD})


def test_file_names_are_kept_as_they_are() -> None:
    """The audit compares them with the files of the folder; nothing here may tidy "../x" into something else."""
    names = ["../x", "/etc/passwd", "a/../b", "", ".", "a\\b", "\u0000"]
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": dict(enumerate(names))}).encode()
    assert list(parse_index(text, "index").weight_map.values()) == names


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"weight_map": {}}x', "not valid JSON"),
        (b'{"weight_map": {"\xff": "a"}}', "not valid JSON"),
        (b'{"weight_map": {}, "weight_map": {}}', "not valid JSON: key 'weight_map' appears twice in one object"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "not valid JSON: key 'a' appears twice in one object"),
        (b'{"weight_map": {}, "metadata": {"total_size": NaN}}', "not valid JSON: 'NaN' is not a finite number"),
        (b'{"weight_map": {}, "metadata": {"total_size": 1e999}}', "not valid JSON: '1e999' is not a finite number"),
        (b'{"weight_map": {}, "metadata": {"total_size": ' + b"9" * 5000 + b"}}", "an integer of 5000 digits"),
        (b'{"weight_map": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "it is nested too deeply"),
        (b"[]", "weight_map is no object of file names"),
        (b"null", "weight_map is no object of file names"),
        (b"{}", "weight_map is no object of file names"),
        (b'{"weight_map": null}', "weight_map is no object of file names"),
        (b'{"weight_map": ["a"]}', "weight_map is no object of file names"),
        (b'{"weight_map": {"a": 1}}', "weight_map is no object of file names"),
        (b'{"weight_map": {"a": null}}', "weight_map is no object of file names"),
        (b'{"weight_map": {"a": ["x"]}}', "weight_map is no object of file names"),
        (b'{"weight_map": {}, "metadata": {"total_size": "7"}}', "metadata.total_size is 7, expected bytes"),
        (b'{"weight_map": {}, "metadata": {"total_size": 7.5}}', "metadata.total_size is 7.5, expected bytes"),
        (b'{"weight_map": {}, "metadata": {"total_size": true}}', "metadata.total_size is True, expected bytes"),
        (b'{"weight_map": {}, "metadata": {"total_size": [7]}}', "metadata.total_size is [7], expected bytes"),
    ],
)
def test_lies_are_told_with_the_files_name(text: bytes, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_index(text, "the index")
    assert str(caught.value).startswith("the index: ")
    assert says in str(caught.value)
    assert caught.value.hint


def test_size_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    text = build_index({"a": SHARD}, 1)
    monkeypatch.setattr(index_module, "MAX_INDEX_BYTES", len(text))
    parse_index(text, "index")
    with pytest.raises(CheckpointError, match=f"index: has {len(text) + 1} bytes, expected at most {len(text)}"):
        parse_index(text + b" ", "index")
