"""What the forward pass asks of an arithmetic. Two answer: `release` runs DeepSeek's, on the kernels; `float32` rounds
nothing, for comparison with other code. The wiring of the model (everything else in this package) is the same for both.

T tokens, S streams of d dims, H heads of D dims, E entries or experts; "activations" are BF16 in `release`.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from v4quant.config import V4Config
from v4quant.kernels.compress_kv import CompressorState
from v4quant.kernels.sparse_attention import Picked
from v4quant.model.arithmetic import Activations, Arithmetic
from v4quant.model.ranks import ALONE, Group
from v4quant.model.weights import CompressorWeights, HyperWeights, Matrix


class Codec(Protocol):
    """How a cache holds its entries in pages."""

    @property
    def entries(self) -> int:
        """Entries of a page."""

    def empty_pages(self, count: int, device: torch.device) -> torch.Tensor:
        """Fresh pages [count, ...]."""

    def write(
        self, x: torch.Tensor, norm: torch.Tensor, cos_sin: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Normalise, rotate and store entries x [T, D] at slots int32 [T]."""

    def read(self, pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Entries at slots int32 [T], decoded: [T, D]."""

    def picked(self, pages: torch.Tensor, slots: torch.Tensor) -> Picked:
        """Entries for attention, at slots int32 [T, L], -1 for none."""


class Operations(Protocol):
    """Every operation of the forward pass that rounds, or could."""

    dtype: torch.dtype
    """Of activations and residual streams."""

    def prepare(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Round activations [T, K] as this matrix, and every one stored alike, wants them."""

    def multiply(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Prepared activations [T, K] times a matrix [N, K]: [T, N]."""

    def linear(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """prepare, then multiply."""

    def partial(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """The same of some columns, x [T, k] times [N, k], before it is rounded: float32 [T, N], to be added up."""

    def plain_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Activations [T, K] times a BF16 weight [N, K], as it is: [T, N]."""

    def wide_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """float32 [T, K] times float32 [N, K]: float32 [T, N]."""

    def grouped_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [T, g, K] times weight [g, N, K], group by group: [T, g, N]."""

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
        """silu(min(gate, limit)) * clamp(up, -limit, limit) of activations [T, m]: float32 [T, m]."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of rows [T, d] with a learned weight."""

    def query_norm_(self, q: torch.Tensor, heads: Group = ALONE) -> torch.Tensor:
        """RMSNorm of each head [T, H, D] without weight, in place; `heads` are the ranks that share them."""

    def rope_(self, x: torch.Tensor, cos_sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """Rotate the last dims of each head [T, H, D], in place."""

    def kv_codec(self, entries: int) -> Codec:
        """Pages of KV entries."""

    def key_codec(self, entries: int) -> Codec:
        """Pages of indexer keys."""

    def compress(
        self,
        kv: torch.Tensor,
        score: torch.Tensor,
        weights: CompressorWeights,
        state: CompressorState,
        sequences: torch.Tensor,
        positions: torch.Tensor,
        ends: torch.Tensor,
    ) -> torch.Tensor:
        """Pool the windows that end at rows `ends`: [E, D]; see kernels/compress_kv."""

    def index_queries(self, q: torch.Tensor) -> torch.Tensor:
        """The indexer's rotated queries [T, H, D] as they are scored."""

    def pick(
        self, q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor, k: int
    ) -> torch.Tensor:
        """The k best of the visible entries, keys [E, D], for each query: int32 [T, k], -1 for none."""

    def attend(self, q: torch.Tensor, sink: torch.Tensor, picked: Sequence[Picked]) -> torch.Tensor:
        """Attention with a sink over picked entries: [T, H, D]."""

    def mix(self, x: torch.Tensor, weights: HyperWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A sublayer's input [T, d] from the streams [T, S, d], and post and comb to return its output with."""

    def combine(self, f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
        """Return a sublayer's output [T, d] to the streams: [T, S, d]."""

    def collapse(self, x: torch.Tensor, weights: HyperWeights) -> torch.Tensor:
        """The streams [T, S, d] as one [T, d], before the final norm."""


def multiply_each(ops: Sequence[Operations], prepared: Sequence[torch.Tensor], matrix: Matrix) -> list[torch.Tensor]:
    """Products of one matrix with prepared activations [T, K] of several runs, which decode it once between them.

    Returns:
        activations [T, N] of each, the same bits as ops.multiply gives.
    """
    pairs = list(zip(ops, prepared, strict=True))
    if matrix.scale is not None:
        return [own.multiply(x, matrix) for own, x in pairs]
    parts: list[list[torch.Tensor]] = [[] for _ in pairs]
    for piece in matrix.pieces():
        for done, (own, x) in zip(parts, pairs, strict=True):
            done.append(own.plain_linear(x, piece))
    return [done[0] if len(done) == 1 else torch.cat(done, 1) for done in parts]


def operations(config: V4Config, arithmetic: Arithmetic) -> Operations:
    """The operations of an arithmetic."""
    if arithmetic.activations is Activations.NONE:
        from v4quant.model.float32 import Float32

        return Float32(config)
    from v4quant.model.release import Release

    return Release(config)
