"""Commands that run a sharded checkpoint: by threads of this process, or under torchrun by a process a rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from v4quant.errors import UsageError

if TYPE_CHECKING:
    from v4quant.checkpoint.process_group import ProcessGroup
    from v4quant.checkpoint.reader import Checkpoint
    from v4quant.checkpoint.sharding.rank_tensors import Sharded
    from v4quant.model.device import Device
    from v4quant.model.process_ranks import ProcessRanks


def device_of(name: str, group: "ProcessGroup") -> "Device":
    """The device that a user named, "cpu" or "cuda"; of several processes each has a GPU of its own.

    Raises:
        UsageError: if it is another, or there is no GPU.
    """
    from v4quant.checkpoint.process_environment import ProcessEnvironment
    from v4quant.model.device import device_named

    found = ProcessEnvironment.read(os.environ) if group.size > 1 else None
    return device_named(name, found.local_rank if found else None)


@contextmanager
def processes_of(
    source: "Checkpoint | Sharded", group: "ProcessGroup", device: "Device"
) -> "Iterator[ProcessRanks | None]":
    """The ranks of a sharded checkpoint as the processes of a job; None where this process is alone.

    Raises:
        UsageError: if there are several processes and no sharded checkpoint, or not one for each of its ranks.
        CheckpointError: if processes have different checkpoints.
    """
    from v4quant.checkpoint.sharding.rank_tensors import Sharded
    from v4quant.model.process_ranks import ProcessRanks, require_same_source

    if group.size == 1:
        yield None
        return
    if not isinstance(source, Sharded):
        raise UsageError(
            f"{group.size:,} processes were started, but {source.where} is a whole checkpoint, which one process runs",
            hint="Start it without torchrun, or give what v4quant shard wrote.",
        )
    with ProcessRanks(source.grid, group, device) as processes:
        require_same_source(source, group)
        yield processes
