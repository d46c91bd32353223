"""One block of the model, a layer or that of an MTP head: attention, then experts, each between hyper-connections.

The two halves are separate because only attention looks at other tokens: a run that knows all of its tokens takes them
through attention chunk by chunk, and through the experts all at once, so that each expert is read once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from v4quant.config import V4Config
from v4quant.model.attention import attention
from v4quant.model.cache import BlockCache
from v4quant.model.chunk import Chunk
from v4quant.model.experts import Asked, ExpertSource, routed_experts, shared_expert
from v4quant.model.operations import Operations
from v4quant.model.ranks import ONE_RANK, Ranks
from v4quant.model.rope import Rotation
from v4quant.model.router import pick_experts
from v4quant.model.weights import BlockWeights


@dataclass(frozen=True)
class Routed:
    """What the second half of a block gives.

    Attributes:
        streams: activations [T, S, d].
        indices: the experts of each token, int64 [T, k].
        weights: float32 [T, k].
    """

    streams: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor


class Block:
    """A block in memory, or a rank's share of one, its routed experts wherever `experts` has them."""

    def __init__(
        self,
        weights: BlockWeights,
        ratio: int,
        experts: ExpertSource,
        config: V4Config,
        ops: Operations,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        self.weights = weights
        self.ratio = ratio
        self.experts = experts
        self._config = config
        self._ops = ops
        self._ranks = ranks
        self._rotation = Rotation(config, ratio, weights.attention.sink.device)

    def with_operations(self, ops: Operations) -> "Block":
        """The same weights, run with other operations."""
        return Block(self.weights, self.ratio, self.experts, self._config, ops, self._ranks)

    def with_weights(self, weights: BlockWeights, experts: ExpertSource) -> "Block":
        """The same arithmetic with other weights."""
        return Block(weights, self.ratio, experts, self._config, self._ops, self._ranks)

    def cache(self, sequences: int) -> BlockCache:
        """An empty cache for so many sequences."""
        return BlockCache(self._config, self.ratio, self._ops, sequences, self.weights.attention.sink.device)

    def attend(
        self, streams: torch.Tensor, chunk: Chunk, cache: BlockCache
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The first half: attention.

        Args:
            streams: activations [T, S, d] of the chunk's tokens.
            chunk: where they stand.
            cache: of this block; takes them in.

        Returns:
            activations [T, S, d], and the indexer's picks, int32 [T, k], None without an indexer.
        """
        weights, ops = self.weights, self._ops
        x, post, comb = ops.mix(streams, weights.attention_mix)  # [T, d]
        x = ops.rms_norm(x, weights.attention_norm)
        found = attention(x, weights.attention, chunk, cache, self._rotation, self._config, ops, self._ranks.tensor)
        return ops.combine(found.out, streams, post, comb), found.picks

    def feed_forward(self, streams: torch.Tensor, input_ids: torch.Tensor) -> Routed:
        """The second half: router and experts.

        Args:
            streams: activations [T, S, d].
            input_ids: int64 [T]; what hash layers route by.
        """
        return feed_forward_each([(self, streams, input_ids)])[0]

    def _ask(self, streams: torch.Tensor, input_ids: torch.Tensor) -> tuple[Asked, torch.Tensor, torch.Tensor]:
        """What the streams ask of the experts, and post and comb to return their output with."""
        weights, ops, config = self.weights, self._ops, self._config
        x, post, comb = ops.mix(streams, weights.ffn_mix)  # [T, d]
        x = ops.rms_norm(x, weights.ffn_norm)
        picked = pick_experts(x, input_ids, weights.router, config, ops)
        # Ranks on unlike machines may differ in a last bit, and an expert of two ranks or of none would be wrong.
        indices, share = (self._ranks.stage.agreed(own) for own in picked)
        return Asked(x, indices, share, config.n_routed_experts, config.swiglu_limit, ops), post, comb

    def _return(
        self, asked: Asked, routed: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
    ) -> Routed:
        """Add the shared expert to what the routed ones gave, float32 [T, d], and return it to the streams."""
        ops, routed = self._ops, self._ranks.stage.sum(routed)
        routed += shared_expert(asked.x, self.weights.shared_expert, asked.limit, ops).float()
        return Routed(ops.combine(routed.to(ops.dtype), streams, post, comb), asked.indices, asked.weights)


def feed_forward_each(runs: Sequence[tuple[Block, torch.Tensor, torch.Tensor]]) -> list[Routed]:
    """The second half of blocks that share one source of experts, which are read once for all runs.

    Args:
        runs: block, streams [T, S, d] and input_ids int64 [T] of each.
    """
    asked = [block._ask(streams, input_ids) for block, streams, input_ids in runs]
    routed = routed_experts([own for own, _, _ in asked], runs[0][0].experts)
    return [
        block._return(own, found, streams, post, comb)
        for (block, streams, _), (own, post, comb), found in zip(runs, asked, routed, strict=True)
    ]
