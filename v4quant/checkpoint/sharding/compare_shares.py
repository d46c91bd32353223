"""Compare the values of a sharded checkpoint with those of the checkpoint it should be made from, tensor by tensor.

Values and not bytes: ranks may hold wo_a as BF16 and experts as FP8. A tensor at a time is in memory, decoded, twice.
"""

import math
from collections.abc import Iterator

import torch

from v4quant.checkpoint.compare import Comparison, FirstDifference
from v4quant.checkpoint.reader import Checkpoint
from v4quant.checkpoint.sharding.joined_weights import JoinedWeights
from v4quant.checkpoint.sharding.rank_tensors import Sharded
from v4quant.checkpoint.sharding.rules import Split, split_of
from v4quant.checkpoint.verify_report import Mismatch
from v4quant.checkpoint.weights import Weights
from v4quant.errors import CheckpointError
from v4quant.inventory import LogicalTensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def share_differences(out: Sharded, source: Checkpoint, prefix: str) -> Iterator[Mismatch]:
    """Tensors whose name begins with `prefix` and whose values in the ranks are not the source's.

    Raises:
        CheckpointError: if the source cannot be read.
    """
    ours, theirs = JoinedWeights(out), Weights(source)
    for tensor in source.logical:
        parsed = source.parsed[tensor.name]
        if not tensor.name.startswith(prefix) or split_of(parsed, out.layout) is Split.LEFT_OUT:
            continue
        if reason := _difference(ours, theirs, tensor):
            ranks = ours.ranks_of(tensor.name)
            held = f" ({'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))})" if ranks else ""
            yield Mismatch(tensor.name, reason + held)


def _difference(ours: JoinedWeights, theirs: Weights, tensor: LogicalTensor) -> str:
    """How a tensor's values differ; "" where they do not."""
    expected = _values(theirs, tensor)
    try:
        found = _values(ours, tensor)
    except CheckpointError as error:
        return str(error)
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return f"is {found.dtype} {list(found.shape)}, expected {expected.dtype} {list(expected.shape)}"
    bits = _BITS[found.element_size()]
    differs = found.view(bits) != expected.view(bits)
    changed = int(differs.sum())
    if not changed:
        return ""
    place = tuple(int(index) for index in differs.nonzero()[0])
    first = FirstDifference(place, float(expected[place]), float(found[place]))
    return Comparison("", False, first, found.numel(), changed, math.nan).describe()


def _values(weights: Weights | JoinedWeights, tensor: LogicalTensor) -> torch.Tensor:
    if tensor.kind == "plain":
        return weights.tensor(tensor.name)
    return weights.matrix(tensor.name.removesuffix(".weight"))
