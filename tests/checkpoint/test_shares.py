"""Work shared out by bytes: everything once, in order, and evenly."""

from hypothesis import given
from hypothesis import strategies as st

from v4quant.checkpoint.shares import share_files, share_in_order

SIZES = st.lists(st.integers(0, 5_000), max_size=60)
PROCESSES = st.integers(1, 9)


@given(SIZES, PROCESSES)
def test_files(sizes: list[int], processes: int) -> None:
    bytes_of = {f"shard {number}": size for number, size in enumerate(sizes)}
    shares = share_files(bytes_of, processes)
    assert len(shares) == processes
    assert sorted(name for share in shares for name in share) == sorted(bytes_of)
    place = list(bytes_of)
    assert all(share == sorted(share, key=place.index) for share in shares)
    loads = [sum(bytes_of[name] for name in share) for share in shares]
    # Without the file that it was given last, the fullest process had no more than any other.
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_files_of_a_release() -> None:
    """46 shards of 3.5 GB and three others over 8 processes: nobody has more than one layer above another."""
    bytes_of = {"embed": 1_060, **{f"layer {n}": 3_530 for n in range(46)}, "head": 1_060, "mtp": 3_600}
    loads = [sum(bytes_of[name] for name in share) for share in share_files(bytes_of, 8)]
    assert max(loads) - min(loads) <= 3_600
    assert share_files({}, 3) == [[], [], []]


def test_the_largest_file_is_given_first() -> None:
    assert share_files({"a": 1, "b": 1, "c": 2}, 2) == [["c"], ["a", "b"]]


@given(SIZES, PROCESSES)
def test_in_order(sizes: list[int], processes: int) -> None:
    ranks = share_in_order(sizes, processes)
    assert len(ranks) == len(sizes)
    assert ranks == sorted(ranks)
    assert set(ranks) <= set(range(processes))
    loads = [0] * processes
    for rank, size in zip(ranks, sizes, strict=True):
        loads[rank] += size
    # Each end of a run is at most half an item from where it should be.
    assert max(loads) <= sum(sizes) / processes + max(sizes, default=0)
