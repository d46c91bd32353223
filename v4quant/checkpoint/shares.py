"""Who does what, when several processes share a job out by bytes; every process works out the same for itself."""

from collections.abc import Mapping, Sequence


def share_files(bytes_of: Mapping[str, int], processes: int) -> list[list[str]]:
    """Share whole files out: each, the largest first, goes to the process with the least so far.

    Args:
        bytes_of: what each file costs, in the order in which a process is to work on them.
        processes: how many there are.

    Returns:
        The files of each process, by rank.
    """
    order = {name: number for number, name in enumerate(bytes_of)}
    loads, shares = [0] * processes, [list[str]() for _ in range(processes)]
    for name in sorted(bytes_of, key=lambda name: (-bytes_of[name], order[name])):
        rank = loads.index(min(loads))
        loads[rank] += bytes_of[name]
        shares[rank].append(name)
    return [sorted(share, key=order.__getitem__) for share in shares]


def share_in_order(sizes: Sequence[int], processes: int) -> list[int]:
    """Share items out in runs of neighbours of about the same bytes, so that each process reads straight ahead.

    Args:
        sizes: bytes of each item, in the order in which they lie on disk.
        processes: how many there are.

    Returns:
        The rank that each item belongs to, never falling.
    """
    total, before, ranks = max(1, sum(sizes)), 0, []
    for size in sizes:
        # An item belongs where its middle lies.
        ranks.append(min(processes - 1, (2 * before + size) * processes // (2 * total)))
        before += size
    return ranks
