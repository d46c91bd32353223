"""The release's operations, counted: rows and multiply-adds that really went through them.

Whoever compares two runs can so tell that both ran in full: a module that never ran differs from nothing.
"""

from collections import Counter
from collections.abc import Sequence
from threading import Lock

import torch

from v4quant.config import V4Config
from v4quant.kernels.compress_kv import CompressorState
from v4quant.kernels.sparse_attention import Picked
from v4quant.model.release import Release
from v4quant.model.weights import CompressorWeights, HyperWeights, Matrix

CLAMPED = "values clamped by swiglu_limit"


class Counted(Release):
    """Operations of the release; shapes and meanings as in `operations.Operations`, bits as in `Release`.

    Attributes:
        counts: by name: "attention", "products", ...
    """

    def __init__(self, config: V4Config) -> None:
        super().__init__(config)
        self._lock = Lock()
        self.counts: Counter[str] = Counter()

    def take(self) -> Counter[str]:
        """What was counted since the last time."""
        counts, self.counts = self.counts, Counter()
        return counts

    def add(self, counts: Counter[str]) -> None:
        """Count what went through the same operations elsewhere."""
        self.counts += counts

    def _count(self, what: str, count: int) -> None:
        with self._lock:  # experts run in threads
            self.counts[what] += count

    def partial(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        self._count("products", len(x) * matrix.weight.numel())
        return super().partial(x, matrix)

    def plain_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self._count("products", len(x) * weight.numel())
        return super().plain_linear(x, weight)

    def wide_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self._count("FP32 products", len(x) * weight.numel())
        return super().wide_linear(x, weight)

    def grouped_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self._count("products", len(x) * weight.numel())
        return super().grouped_linear(x, weight)

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
        self._count(CLAMPED, int((gate > limit).sum()) + int((up.abs() > limit).sum()))
        self._count("experts", len(gate))
        return super().swiglu(gate, up, limit)

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
        self._count("compressed entries", len(ends))
        return super().compress(kv, score, weights, state, sequences, positions, ends)

    def pick(
        self, q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, visible: torch.Tensor, k: int
    ) -> torch.Tensor:
        self._count("indexer", int((visible > 0).sum()))
        return super().pick(q, keys, weights, visible, k)

    def attend(self, q: torch.Tensor, sink: torch.Tensor, picked: Sequence[Picked]) -> torch.Tensor:
        self._count("attention", len(q))
        self._count("attended entries", sum(int((keys.indices >= 0).sum()) for keys in picked))
        return super().attend(q, sink, picked)

    def mix(self, x: torch.Tensor, weights: HyperWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._count("hyper-connections", len(x))
        return super().mix(x, weights)

    def combine(self, f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
        self._count("hyper-connections", len(x))
        return super().combine(f, x, post, comb)
