"""Run sharded checkpoints as one process of a job, and save what every layer gives: started by test_process_ranks.py.

python -m torch.distributed.run --nproc-per-node N tests/model/run_ranks.py FAULT SHARDED ...

Outputs of each lie beside it, in NAME.pt; FAULT is "none" or what happens to the second process: "error" or "killed".
"""

import os
import signal
import sys
from pathlib import Path

import torch

from v4quant.checkpoint.process_group import EndedElsewhereError, ProcessGroup
from v4quant.checkpoint.sharding.rank_tensors import open_ranks
from v4quant.errors import CheckpointError, V4QuantError
from v4quant.model.arithmetic import Arithmetic
from v4quant.model.process_ranks import ProcessRanks
from v4quant.model.rank_worker import Answer, Order, RankWorker
from v4quant.model.ranked import RankedModel, process_model, serve_rank
from v4quant.model.streaming import Pass, take

TOKENS, PREFILL = 24, 22


def outputs(model: RankedModel) -> list[torch.Tensor]:
    """Streams after every layer, and logits of the last token."""
    ids = torch.arange(TOKENS) * 7 % 500
    schedule = model.schedule([ids], [PREFILL, 1])
    streams, found = model.embed(schedule.input_ids), []
    for block in model.blocks(0, model.config.num_hidden_layers):
        (result,) = take(block, [Pass(model.ops, streams, schedule)])
        streams = result.streams
        found.append(streams)
    head = model.head()
    x = head.collapse(streams[-1:])
    return [*found, *(head.product(x, piece) for piece in head.pieces())]


class Faulty(RankWorker):
    """A rank that fails in its third block, or is killed there."""

    fault = ""
    blocks = 0

    def do(self, order: Order) -> Answer:
        self.blocks += order.what == "take"
        if self.blocks == 3 and self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.blocks == 3 and self.fault == "error":
            raise CheckpointError("this rank has had enough")
        return super().do(order)


def run(folder: Path, fault: str) -> None:
    """One checkpoint, in a job of its own."""
    sharded = open_ranks(folder)
    device = torch.device("cpu")
    with (
        ProcessGroup.from_environment() as group,
        group.ending_together(),
        torch.inference_mode(),
        ProcessRanks(sharded.grid, group, device) as processes,
    ):
        if group.is_first:
            with process_model(sharded, Arithmetic(), device, processes) as model:
                torch.save(outputs(model), folder.with_suffix(".pt"))
        elif fault != "none" and group.rank == 1:
            Faulty.fault = fault
            processes.serve(lambda s: Faulty(sharded.ranks[1], s.arithmetic, device, s.config, processes.ranks))
        else:
            serve_rank(sharded, device, processes)


if __name__ == "__main__":
    try:
        for folder in sys.argv[2:]:
            run(Path(folder), sys.argv[1])
    except EndedElsewhereError as ended:
        sys.exit(ended.exit_code)
    except V4QuantError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
