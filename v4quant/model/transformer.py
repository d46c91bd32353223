"""The whole model in memory, for what fits: prefill, pieces of a prefill, decode, several sequences at once."""

from collections.abc import Sequence

import torch

from v4quant.checkpoint.reader import Checkpoint
from v4quant.model.arithmetic import Arithmetic
from v4quant.model.block import Block
from v4quant.model.cache import BlockCache
from v4quant.model.chunk import Chunk
from v4quant.model.expert_sources import ResidentExperts
from v4quant.model.head import Head, embed, streams_of
from v4quant.model.operations import operations
from v4quant.model.weights import Reader


class Transformer:
    """All layers of a checkpoint, ready to run."""

    def __init__(
        self, checkpoint: Checkpoint, arithmetic: Arithmetic | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """Read every layer and the head.

        Raises:
            CheckpointError: if the checkpoint has problems, or a tensor is missing or damaged.
        """
        self.config = checkpoint.config
        self._reader = Reader(checkpoint, arithmetic or Arithmetic(), device)
        self._ops = operations(self.config, self._reader.arithmetic)
        self._blocks = [
            Block(
                self._reader.block("layers", index),
                self._reader.ratio("layers", index),
                ResidentExperts(self._reader, "layers", index),
                self.config,
                self._ops,
            )
            for index in range(self.config.num_hidden_layers)
        ]
        self._head = Head(self._reader, self._ops, keep=True)

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
