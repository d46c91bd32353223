"""The release's arithmetic with its FP32 sums taken in another order: what it may give as well.

The released code, engines and machines differ in the order of their sums, and nothing says which is right; how far this
run is from the plain one is the noise that any comparison of two checkpoints has to be measured by. What is rounded, to
what, and where, is the same; only decoded products are reordered (`Products.DECODED`).

Where a sum runs along the columns of two operands, both are turned round; attention takes the keys of each block of 64
backwards, so that each block's largest score, which the released code rounds by, stays. Left in order: the pooling of a
compressor's window, and the sum over experts, which the release fixes.
"""

from collections.abc import Sequence

import torch

from v4quant.kernels.sparse_attention import BLOCK_KEYS, Picked, joined
from v4quant.model.ranks import ALONE, Group
from v4quant.model.release import Release
from v4quant.model.weights import HyperWeights

# Rows of a weight that are turned round at a time: 1 MiB of BF16, which stays in a core's cache.
_PIECE_VALUES = 2**19


class Reordered(Release):
    """Operations of the release, sums backwards; shapes and meanings as in `operations.Operations`."""

    def plain_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._backwards(x, weight)

    def wide_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._backwards(x, weight)

    def _wide_product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return super()._wide_product(x.flip(1), weight.flip(1))

    def _backwards(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        turned, rows = x.flip(1), max(1, _PIECE_VALUES // weight.shape[1])
        parts = [torch.nn.functional.linear(turned, piece.flip(1)) for piece in torch.split(weight, rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def grouped_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return super().grouped_linear(x.flip(2), weight.flip(2))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return super().rms_norm(x.flip(1), weight.flip(0)).flip(1)

    def query_norm_(self, q: torch.Tensor, heads: Group = ALONE) -> torch.Tensor:
        return q.copy_(super().query_norm_(q.flip(2), heads).flip(2))

    def pick(
        self, q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor, k: int
    ) -> torch.Tensor:
        return super().pick(q.flip(1), keys, weights.flip(1), visible, k)  # heads

    def attend(self, q: torch.Tensor, sink: torch.Tensor, picked: Sequence[Picked]) -> torch.Tensor:
        keys = joined(picked, q.shape[2])
        indices = torch.cat([block.flip(1) for block in torch.split(keys.indices, BLOCK_KEYS, 1)], 1)  # 0 for none
        entries = keys.entries[1:].flip(1)
        return super().attend(q.flip(2), sink, [Picked(entries, (indices - 1).to(torch.int32))]).flip(2)

    def mix(self, x: torch.Tensor, weights: HyperWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, post, comb = super().mix(x.flip(2), _turned(weights, x))
        return y.flip(1), post, comb

    def combine(self, f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
        return super().combine(f, x.flip(1), post.flip(1), comb.flip(1, 2)).flip(1)  # streams

    def collapse(self, x: torch.Tensor, weights: HyperWeights) -> torch.Tensor:
        return super().collapse(x.flip(2), _turned(weights, x)).flip(1)


def _turned(weights: HyperWeights, x: torch.Tensor) -> HyperWeights:
    """Weights of a hyper-connection for streams x [T, S, d] whose dims are turned round."""
    fn = weights.fn.view(len(weights.fn), x.shape[1], x.shape[2]).flip(2)  # [rows, S, d]
    return HyperWeights(fn.flatten(1), weights.base, weights.scale)
