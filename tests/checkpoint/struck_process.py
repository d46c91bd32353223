"""A process of a torchrun job that, once, kills itself or all of the job in the middle of a conversion.

    torchrun ... -m tests.checkpoint.struck_process one|all SNAPSHOT convert SRC OUT ...

The last process strikes while it writes its second shard, once its first is in the journal. SNAPSHOT then holds the
finished shards with inode and time of last change, which must still be the same in the end.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.checkpoint.journals import finished
from v4quant.checkpoint.output import ShardFile
from v4quant.cli.main import main


class Striker:
    """Counts the shards that this process has written, and strikes at the second."""

    def __init__(self, whom: str, snapshot: Path, out: Path) -> None:
        self._whom = whom
        self._snapshot = snapshot
        self._out = out
        self._own: list[str] = []
        self._finish = ShardFile.finish
        self._pid_file(int(os.environ["RANK"])).write_text(str(os.getpid()))

    def _pid_file(self, rank: int) -> Path:
        return self._snapshot.with_name(f"{self._snapshot.name}.{rank}")

    def finish(self, file: ShardFile) -> None:
        """In the place of ShardFile.finish."""
        if self._own:
            while self._own[0] not in (found := finished(self._out)):
                time.sleep(0.01)
            self._snapshot.write_text(json.dumps(found))
            if self._whom == "all":
                for rank in range(int(os.environ["WORLD_SIZE"]) - 1):
                    os.kill(int(self._pid_file(rank).read_text()), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        self._finish(file)
        self._own.append(file.path.name)


if __name__ == "__main__":
    whom, snapshot, *argv = sys.argv[1:]
    striker = Striker(whom, Path(snapshot), Path(argv[2]))
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    if is_last and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        ShardFile.finish = lambda self: striker.finish(self)  # type: ignore[method-assign]
    sys.exit(main(argv))
