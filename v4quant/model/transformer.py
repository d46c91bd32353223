"""The whole model in memory, for what fits: prefill, pieces of a prefill, decode, several sequences at once."""

from collections.abc import Callable, Sequence

import torch

from v4quant.checkpoint.reader import Checkpoint
from v4quant.config import V4Config
from v4quant.model.arithmetic import Arithmetic
from v4quant.model.block import Block
from v4quant.model.cache import BlockCache
from v4quant.model.chunk import Chunk
from v4quant.model.expert_sources import ResidentExperts
from v4quant.model.head import Head, embed, streams_of
from v4quant.model.operations import operations
from v4quant.model.weights import Reader


class Transformer:
    """All layers of a checkpoint, ready to run.

    Attributes:
        config: what it runs by.
        device: where it computes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        arithmetic: Arithmetic | None = None,
        device: torch.device | str = "cpu",
        *,
        config: V4Config | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Read every layer and the head.

        Args:
            config: to run by, if not the checkpoint's own; of the same shapes.
            progress: called with the name of each layer that is read.

        Raises:
            CheckpointError: if the checkpoint has problems, or a tensor is missing or damaged.
        """
        self.config = config or checkpoint.config
        self._reader = Reader(checkpoint, arithmetic or Arithmetic(), device)
        self.device = self._reader.device
        self._ops = operations(self.config, self._reader.arithmetic)
        self._blocks = []
        for index in range(self.config.num_hidden_layers):
            self._blocks.append(self._read_block(index))
            progress(f"layer {index}")
        self._head = Head(self._reader, self._ops, keep=True)

    def _read_block(self, index: int) -> Block:
        weights = self._reader.block("layers", index)
        experts = ResidentExperts(self._reader, "layers", index)
        return Block(weights, self._reader.ratio("layers", index), experts, self.config, self._ops)

    def cache(self, sequences: int) -> list[BlockCache]:
        """Empty caches of all layers for so many sequences."""
        return [block.cache(sequences) for block in self._blocks]

    def streams(self, chunk: Chunk, caches: Sequence[BlockCache]) -> torch.Tensor:
        """Residual streams of a chunk's tokens after the last layer: activations [T, S, d].

        Args:
            chunk: tokens that continue where the caches end.
            caches: one a layer; take the tokens in.
        """
        streams = streams_of(embed(chunk.input_ids, self._reader, self._ops), self.config.hc_mult)
        for block, cache in zip(self._blocks, caches, strict=True):
            attended, _ = block.attend(streams, chunk, cache)
            streams = block.feed_forward(attended, chunk.input_ids).streams
        return streams

    def logits(self, streams: torch.Tensor) -> torch.Tensor:
        """Next-token logits of streams [T, S, d]: float32 [T, V]."""
        return self._head.logits(streams)
