"""The journal of an unfinished conversion: what it keeps over a kill, what it forgets, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from v4quant.checkpoint.certificate import TensorRecord, Verdict
from v4quant.checkpoint.journal import Journal, JournalHeader, lock_journal
from v4quant.checkpoint.reader import JOURNAL_NAME
from v4quant.errors import CheckpointError, OutputError

HEADER = JournalHeader("plan", {"config.json": "10 1", "model-00001-of-00001.safetensors": "20 2"})


def record(tensor: str, digit: str = "0") -> TensorRecord:
    return TensorRecord(tensor, "BF16", (2, 3), digit * 64, Verdict.BIT_IDENTICAL, {tensor: digit * 64})


def begun(folder: Path, *shards: str) -> Journal:
    """A journal in which these shards are finished, two tensors each."""
    journal = lock_journal(folder)
    journal.begin(HEADER)
    for shard in shards:
        journal.append(shard, [record(f"{shard}.a"), record(f"{shard}.b")])
    return journal


def resumed(folder: Path, header: JournalHeader = HEADER) -> Journal:
    journal = lock_journal(folder)
    try:
        journal.resume(header)
    except BaseException:
        journal.close()
        raise
    return journal


def finished_in(folder: Path) -> set[str]:
    journal = resumed(folder)
    journal.close()
    return journal.finished


def path_of(folder: Path) -> Path:
    return folder / JOURNAL_NAME


def test_a_new_journal_has_no_header(tmp_path: Path) -> None:
    journal = lock_journal(tmp_path)
    assert journal.header() is None
    assert journal.finished == set()
    journal.begin(HEADER)
    assert journal.header() == HEADER
    journal.close()


def test_finished_shards_and_their_records_are_found_again(tmp_path: Path) -> None:
    begun(tmp_path, "b", "a").close()
    journal = resumed(tmp_path)
    assert journal.finished == {"a", "b"}
    assert [r.tensor for r in journal.records()] == ["a.a", "a.b", "b.a", "b.b"]  # in shard order, as certificates are
    journal.append("c", [record("c.a")])
    assert [r.tensor for r in journal.records()] == ["a.a", "a.b", "b.a", "b.b", "c.a"]
    journal.close()
    assert finished_in(tmp_path) == {"a", "b", "c"}


@pytest.mark.parametrize("cut", [1, 2, 20, 200, 400])
def test_a_torn_end_costs_only_the_last_shard(tmp_path: Path, cut: int) -> None:
    """Whatever part of the last shard's lines a kill left, what is appended then stands on its own."""
    begun(tmp_path, "a", "b").close()
    whole = path_of(tmp_path).read_bytes()
    path_of(tmp_path).write_bytes(whole[:-cut])
    journal = resumed(tmp_path)
    assert journal.finished == {"a"}
    assert whole.startswith(path_of(tmp_path).read_bytes())
    journal.append("b", [record("b.a", "1")])
    assert [r.sha256[0] for r in journal.records()] == ["0", "0", "1"]
    journal.close()
    again = resumed(tmp_path)
    assert again.finished == {"a", "b"}
    assert len(list(again.records())) == 3
    again.close()


def test_every_torn_end_is_survived(tmp_path: Path) -> None:
    begun(tmp_path, "a", "b").close()
    whole = path_of(tmp_path).read_bytes()
    header = whole.index(b"\n") + 1
    end_of_a = whole.index(b'{"finished": "a"}') + len('{"finished": "a"}\n')
    for size in range(header, len(whole) + 1, 7):
        path_of(tmp_path).write_bytes(whole[:size])
        journal = resumed(tmp_path)
        assert journal.finished == ({"a", "b"} if size == len(whole) else {"a"} if size >= end_of_a else set()), size
        assert len(list(journal.records())) == 2 * len(journal.finished)
        journal.close()


@pytest.mark.parametrize("kept", [0, 1, 30])
def test_a_torn_header_is_begun_anew(tmp_path: Path, kept: int) -> None:
    begun(tmp_path, "a").close()
    path_of(tmp_path).write_bytes(path_of(tmp_path).read_bytes()[:kept])
    journal = lock_journal(tmp_path)
    assert journal.header() is None
    journal.begin(HEADER)
    journal.append("b", [record("b.a")])
    journal.close()
    assert finished_in(tmp_path) == {"b"}


def test_a_shard_done_twice_counts_as_it_was_done_last(tmp_path: Path) -> None:
    journal = begun(tmp_path, "a", "b")
    journal.append("a", [record("a.a", "7")])
    assert [(r.tensor, r.sha256[0]) for r in journal.records()] == [("a.a", "7"), ("b.a", "0"), ("b.b", "0")]
    journal.close()
    again = resumed(tmp_path)
    assert [r.sha256[0] for r in again.records()] == ["7", "0", "0"]
    again.close()


def test_records_are_those_of_finished_shards(tmp_path: Path) -> None:
    """A shard whose file went missing is taken out of `finished`, and its records go with it."""
    journal = begun(tmp_path, "a", "b")
    journal.finished = {"b"}
    assert [r.tensor for r in journal.records()] == ["b.a", "b.b"]
    journal.close()


def test_another_plan_is_refused(tmp_path: Path) -> None:
    begun(tmp_path, "a").close()
    before = path_of(tmp_path).read_bytes()
    with pytest.raises(OutputError, match="with other options") as caught:
        resumed(tmp_path, replace(HEADER, plan="another"))
    assert "--overwrite" in caught.value.hint
    assert path_of(tmp_path).read_bytes() == before


@pytest.mark.parametrize(
    ("fingerprints", "named"),
    [
        ({**HEADER.fingerprints, "config.json": "10 9"}, "config.json"),
        ({"config.json": "10 1"}, "model-00001-of-00001.safetensors"),
        ({**HEADER.fingerprints, "model-00002-of-00002.safetensors": "1 1"}, "model-00002-of-00002.safetensors"),
    ],
)
@pytest.mark.parametrize("plan", ["plan", "another"])
def test_a_changed_source_is_refused_by_name(
    tmp_path: Path, fingerprints: dict[str, str], named: str, plan: str
) -> None:
    begun(tmp_path, "a").close()
    with pytest.raises(CheckpointError, match=f"source has changed since it began: {named}") as caught:
        resumed(tmp_path, JournalHeader(plan, fingerprints))
    assert "--overwrite" in caught.value.hint


def test_one_process_at_a_time(tmp_path: Path) -> None:
    journal = begun(tmp_path, "a")
    with pytest.raises(OutputError, match="another run is writing"):
        lock_journal(tmp_path)
    journal.close()
    lock_journal(tmp_path).close()


def test_remove_forgets_everything(tmp_path: Path) -> None:
    journal = begun(tmp_path, "a")
    journal.remove()
    assert list(tmp_path.iterdir()) == []
    lock_journal(tmp_path).close()  # the lock is gone, too


@pytest.mark.parametrize(
    "line", ["x", "[]", "{}", "null", '{"journal": 1}', '{"journal": 1, "plan": "p"}', '{"finished": "a"}']
)
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, line: str) -> None:
    path_of(tmp_path).write_text(line + "\n")
    journal = lock_journal(tmp_path)
    with pytest.raises(OutputError, match="not a journal that v4quant writes"):
        journal.header()
    journal.close()
    assert path_of(tmp_path).read_text() == line + "\n"


@pytest.mark.parametrize("line", ["x", "[]", '{"shard": "a"}', '{"shard": "a", "record": {}}', '"\\ud800"'])
def test_a_damaged_line_is_an_error_not_a_crash(tmp_path: Path, line: str) -> None:
    begun(tmp_path).close()
    with path_of(tmp_path).open("a") as file:
        file.write(line + "\n" + json.dumps({"finished": "a"}) + "\n")
    journal = resumed(tmp_path)
    with pytest.raises((OutputError, CheckpointError), match=JOURNAL_NAME):
        list(journal.records())
    journal.close()
