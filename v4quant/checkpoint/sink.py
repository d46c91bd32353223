"""What becomes of a finished shard: it stays in the output folder, unless another sink takes it (hub/stream.py)."""

from pathlib import Path
from typing import Protocol

from v4quant.checkpoint.certificate import TensorRecord
from v4quant.checkpoint.layout import Shard
from v4quant.checkpoint.plan import Plan
from v4quant.checkpoint.run_folder import is_there


class ShardSink(Protocol):
    """Takes the finished shards of a conversion, in their order."""

    @property
    def disk_bytes(self) -> int:
        """The most that the run takes on the output's disk at a time."""

    def holds(self, shard: Shard) -> bool:
        """True if a finished shard is safe and need not be made again."""

    def begin(self, finished: set[str]) -> None:
        """The output folder is ours, and its journal open.

        Args:
            finished: names of the shards that are done.

        Raises:
            V4QuantError: if it cannot begin.
        """

    def take(self, shard: Shard, records: list[TensorRecord]) -> None:
        """A shard has its final name and its journal lines; called again after a kill, if it was not done.

        Raises:
            V4QuantError: if it cannot be taken; the run ends, and the next one takes it.
        """

    def complete(self) -> None:
        """Everything is written but the journal still there; called again after a kill.

        Raises:
            V4QuantError: if it cannot be completed.
        """

    def stop(self) -> None:
        """The run is ending early: let go of whatever a thread may be waiting for."""


class KeptShards:
    """Leaves every shard where it is. Implements ShardSink."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self._out = out
        self.disk_bytes = plan.disk_bytes

    def holds(self, shard: Shard) -> bool:
        """True if the shard's file is there, whole."""
        return is_there(self._out / shard.name, shard.file_bytes)

    def begin(self, finished: set[str]) -> None:
        """Nothing to do."""

    def take(self, shard: Shard, records: list[TensorRecord]) -> None:
        """Nothing to do."""

    def complete(self) -> None:
        """Nothing to do."""

    def stop(self) -> None:
        """Nothing to do."""
