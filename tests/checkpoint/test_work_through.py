"""The loop over files of `shard` and `merge`: whatever fails, in a thread or while a file is noted, is said."""

import threading

import pytest

from v4quant.checkpoint.sharding.units import work_through
from v4quant.checkpoint.stream import Worker

NAMES = [str(number) for number in range(20)]


@pytest.mark.parametrize("workers", [1, 4])
def test_every_file_is_noted_with_its_result(workers: int) -> None:
    noted: dict[str, str] = {}
    work_through(NAMES, lambda name, _worker: name * 2, noted.__setitem__, workers=workers, advance=None)
    assert noted == {name: name * 2 for name in NAMES}


@pytest.mark.parametrize("bad", ["0", "7", "19"])
def test_a_file_that_could_not_be_noted_is_an_error(bad: str) -> None:
    """Be it the first or the last: a full disk is often found only when a file is synced."""

    def finish(name: str, _result: None) -> None:
        if name == bad:
            raise OSError(name)

    with pytest.raises(OSError, match=f"^{bad}$"):
        work_through(NAMES, lambda _name, _worker: None, finish, workers=2, advance=None)


def test_an_error_ends_the_others_between_two_pieces() -> None:
    failed = threading.Event()

    def work(name: str, worker: Worker) -> None:
        if name == "0":
            failed.set()
            raise ValueError(name)
        failed.wait()
        while True:
            worker.step(0)

    with pytest.raises(ValueError, match=r"^0$"):
        work_through(NAMES, work, lambda _name, _result: None, workers=2, advance=None)
