"""Processes of one job: what the environment may say, messages, and that no failure leaves another process waiting."""

import threading
import time
from collections import Counter

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.checkpoint.process_groups import BreakableStore, group_of, in_processes, new_store
from v4quant.checkpoint import process_group, process_store
from v4quant.checkpoint.process_environment import ProcessEnvironment
from v4quant.checkpoint.process_group import EndedElsewhereError, ProcessGroup
from v4quant.checkpoint.process_store import JobStore, LostProcessError
from v4quant.errors import CheckpointError, OutputError, UsageError

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "node-1.cluster", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(process_store, "POLL_SECONDS", 0.002)
    monkeypatch.setattr(process_group, "POLL_SECONDS", 0.002)


def test_the_environment_of_torchrun() -> None:
    assert ProcessEnvironment.read(TORCHRUN) == ProcessEnvironment(2, 4, 0)
    for address in ("::1", "10.0.0.1", "fe80::1%eth0"):
        assert ProcessEnvironment.read(TORCHRUN | {"MASTER_ADDR": address}) is not None
    assert ProcessEnvironment.read({"LOCAL_RANK": "7", "PATH": ""}) is None
    alone = ProcessGroup.from_environment({"RANK": "0", "WORLD_SIZE": "1"})
    assert (alone.rank, alone.size, alone.is_first) == (0, 1, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in ("", "4", "-1", "x", "1.0", "٣", "9" * 400, "0x1", " 1")),
        *(("WORLD_SIZE", value) for value in ("", "0", "-4", "four", "2", "1000000", "4\n")),
        *(("LOCAL_RANK", value) for value in ("", "4", "-1", "a")),
        *(("MASTER_PORT", value) for value in ("", "0", "65536", "http")),
        *(("MASTER_ADDR", value) for value in ("", "a b", "host\n", "x" * 300, "-$(id)", "file:///etc")),
    ],
)
def test_an_environment_that_makes_no_sense(name: str, value: str) -> None:
    blamed = "RANK" if (name, value) == ("WORLD_SIZE", "2") else name
    with pytest.raises(UsageError, match=rf"environment variable {blamed} ") as caught:
        ProcessGroup.from_environment(TORCHRUN | {name: value})
    assert "torchrun" in caught.value.hint
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_that_is_missing(missing: str) -> None:
    with pytest.raises(UsageError, match=rf"environment variable {missing} is not set"):
        ProcessGroup.from_environment({name: value for name, value in TORCHRUN.items() if name != missing})


def test_messages() -> None:
    def work(group: ProcessGroup) -> object:
        group.barrier()
        group.send(f"note/{group.rank}", {"from": group.rank})
        gathered = [group.gather(group.rank * 10), group.gather([None])]
        notes = [group.receive(f"note/{rank}") for rank in range(group.size)] if group.is_first else []
        again = group.receive("note/1") if group.is_first else None
        return group.token, gathered, group.broadcast(f"by {group.rank}"), group.broadcast(None), notes, again

    first, second, third = in_processes(3, work)
    assert isinstance(first, tuple)
    token = first[0]
    assert len(token) == 16
    notes = [{"from": rank} for rank in range(3)]
    assert first == (token, [[0, 10, 20], [[None]] * 3], "by 0", None, notes, None)
    assert second == third == (token, [[], []], "by 0", None, [], None)


def test_a_group_of_one() -> None:
    with ProcessGroup() as group, group.ending_together():
        group.barrier()
        assert (group.gather(5), group.broadcast(6), group.token) == ([5], 6, "")
        counted = Counter[str]()
        group.progress(lambda count, item: counted.update({item: count}))(3, "x")
        assert counted == {"x": 3}


def test_what_an_earlier_attempt_left_in_the_store_is_not_taken_for_news() -> None:
    store = new_store()

    def fail(group: ProcessGroup) -> None:
        if group.rank == 1:
            raise OutputError("disk full")
        group.barrier()

    assert [type(found) for found in in_processes(2, fail, store)] == [EndedElsewhereError, OutputError]
    # Of a process that was killed while it met the others, there is only the number that it showed.
    store.set("v4quant/join/1", "0123456789abcdef")
    assert in_processes(2, lambda group: group.broadcast(group.rank), store) == [0, 0]


def test_an_answer_to_an_earlier_attempt_is_not_taken_for_one() -> None:
    store, tokens = new_store(), []
    store.set("v4quant/welcome/1", "0123456789abcdef 0123456789abcdef")

    def join(rank: int) -> None:
        tokens.append(JobStore(rank, 2, store).token)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (1, 0)]
    threads[0].start()
    threads[0].join(0.1)
    assert threads[0].is_alive()
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert len(tokens) == 2
    assert tokens[0] == tokens[1] != "0123456789abcdef"


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_that_fails_stops_the_others_at_their_next_step(failing: int) -> None:
    def work(group: ProcessGroup) -> None:
        report = group.progress(lambda _count, _item: None)
        if group.rank == failing:
            raise CheckpointError("weights are NaN")
        if group.rank == (failing + 1) % 3:
            group.gather(1) if group.rank else group.broadcast(group.gather(1))
            group.barrier()
        while True:
            report(1, "x")
            time.sleep(0.001)

    for rank, found in enumerate(in_processes(3, work)):
        assert isinstance(found, CheckpointError if rank == failing else EndedElsewhereError)
        assert found.exit_code == 3


def test_one_that_has_nothing_more_to_do_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    settle = process_group._settle

    def measured(store: JobStore, topics: list[str]) -> None:
        start = time.monotonic()
        settle(store, topics)
        waited.append(time.monotonic() - start)

    def work(group: ProcessGroup) -> None:
        if group.is_first:
            group.gather(None)
            time.sleep(0.1)
            raise OutputError("disk full")
        group.gather(None)

    monkeypatch.setattr(process_group, "_settle", measured)
    first, second = in_processes(2, work)
    assert isinstance(first, OutputError)
    assert second is None
    assert max(waited) < process_group.SETTLE_SECONDS / 2


def test_of_two_that_fail_one_speaks() -> None:
    def work(group: ProcessGroup) -> None:
        raise OutputError(f"disk {group.rank} is full")

    found = Counter(type(error) for error in in_processes(4, work))
    assert found == {OutputError: 1, EndedElsewhereError: 3}


def test_an_interrupt_ends_all_with_its_code() -> None:
    interrupts = []

    def work(group: ProcessGroup) -> None:
        try:
            with group.ending_together():
                if group.rank == 1:
                    raise KeyboardInterrupt
                group.barrier()
        except KeyboardInterrupt:
            interrupts.append(group.rank)

    first, second = in_processes(2, work)
    assert isinstance(first, EndedElsewhereError)
    assert (first.exit_code, second, interrupts) == (130, None, [1])


@pytest.mark.parametrize("silent", [0, 1])
def test_one_that_dies_without_a_word_is_noticed(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "LOST_SECONDS", 0.3)
    store, start = new_store(), time.monotonic()
    dying = threading.Thread(target=lambda: JobStore(silent, 3, store))  # meets the others, then nothing more
    dying.start()
    living = [rank for rank in range(3) if rank != silent]
    found: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            with group_of(rank, 3, store) as group, group.ending_together():
                group.barrier()
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in living]
    for thread in threads:
        thread.start()
    for thread in [*threads, dying]:
        thread.join(30)
    assert found.keys() == set(living)
    assert {getattr(error, "exit_code", None) for error in found.values()} == {4}
    spoken = [error for error in found.values() if isinstance(error, LostProcessError)]
    assert spoken
    assert all(f"process {silent} of 3 has not been heard of" in str(error) for error in spoken)
    # Nobody waits for the dead one to settle.
    assert time.monotonic() - start < 10


def test_a_store_that_is_gone_ends_everybody() -> None:
    store = BreakableStore()

    def work(group: ProcessGroup) -> None:
        group.barrier()
        store.is_dead.set()
        group.barrier()

    for found in in_processes(2, work, store):
        assert isinstance(found, LostProcessError)
        assert "cannot reach the other processes of this job: Connection reset by peer" in str(found)


def test_who_waits_in_a_part_of_the_store_keeps_no_heartbeat_back() -> None:
    """Collectives wait there for processes that may take minutes to load."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store, came = JobStore(0, 1, server), []
    waiting = threading.Thread(target=lambda: came.append(store.part("ranks").get("rank 1")))
    waiting.start()
    waiting.join(0.2)
    beating = threading.Thread(target=lambda: store.put("alive/0", 1), daemon=True)
    beating.start()
    beating.join(20)
    is_free, is_waiting = not beating.is_alive(), waiting.is_alive()
    TCPStore("127.0.0.1", server.port).set(f"v4quant/{store.token}/ranks/rank 1", "here")
    waiting.join(20)
    assert (is_free, is_waiting, came) == (True, True, [b"here"])


@pytest.mark.parametrize("value", ["{", "°", "7", "[1, 2, 3]", "null"])
def test_a_store_in_which_another_program_writes(value: str) -> None:
    store = new_store()

    def work(group: ProcessGroup) -> None:
        group.barrier()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            store.set(f"v4quant/{group.token}/alive/{1 - group.rank}", value)
            group.check()
            time.sleep(0.001)

    found = in_processes(2, work, store)
    assert {getattr(error, "exit_code", error) for error in found} == {4}
    assert any(isinstance(error, LostProcessError) for error in found)


def test_others_that_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_store, "START_SECONDS", 0.05)
    with pytest.raises(LostProcessError, match="seconds for 2 of 3 processes of this job to start"):
        JobStore(0, 3, new_store())
    with pytest.raises(LostProcessError, match="seconds for process 0 of this job to start"):
        JobStore(1, 3, new_store())


def test_the_first_process_hears_of_everybodys_bytes() -> None:
    counted = Counter[str]()

    def work(group: ProcessGroup) -> None:
        report = group.progress(lambda count, item: counted.update({item: count}))
        for _ in range(10):
            report(group.rank + 1, "own")
            time.sleep(0.01)  # over several heartbeats
        deadline = time.monotonic() + 20
        while group.is_first and counted.total() < 60 and time.monotonic() < deadline:
            time.sleep(0.005)
        group.barrier()

    assert in_processes(3, work) == [None] * 3
    assert counted == {"own": 10, "other processes": 50}
