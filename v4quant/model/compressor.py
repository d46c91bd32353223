"""Compressed entries: pool the windows that a chunk completes, and keep the open ones for the next chunk."""

import torch

from v4quant.kernels.compress_kv import CompressorState, compressor_append_, window_ends
from v4quant.model.cache import PagedStore
from v4quant.model.chunk import Chunk
from v4quant.model.operations import Operations
from v4quant.model.rope import Rotation
from v4quant.model.weights import CompressorWeights


def compress(
    x: torch.Tensor,
    weights: CompressorWeights,
    chunk: Chunk,
    store: PagedStore,
    state: CompressorState,
    rotation: Rotation,
    ops: Operations,
) -> None:
    """Write the entries whose last token is in this chunk; entry e covers tokens e R to (e + 1) R - 1.

    Args:
        x: activations [T, d].
        store: receives the entries; room is reserved.
        state: of the same block; takes in the chunk's tokens.
    """
    ratio = weights.ape.shape[0]
    wide = x.float()
    kv, score = ops.wide_linear(wide, weights.wkv), ops.wide_linear(wide, weights.wgate)  # [T, C] both
    ends = window_ends(chunk.positions, ratio)  # [E]
    if len(ends):
        pooled = ops.compress(kv, score, weights, state, chunk.sequences, chunk.positions, ends)  # [E, D]
        entries = chunk.positions[ends] // ratio
        # An entry stands at the first position of its window.
        store.write(pooled, weights.norm, rotation.at(entries * ratio), chunk.sequences[ends], entries)
    compressor_append_(kv, score, weights.ape, state, chunk.sequences, chunk.positions)
