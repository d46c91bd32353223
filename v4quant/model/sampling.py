"""The next token from its logits: the best one, or one drawn at a temperature from the most probable ones.

    p = softmax(logits / temperature), cut to the fewest tokens that hold top_p of it, the most probable first

Equal logits stand in the order of their ids, for the best one and for the cut. Sums are float64 and the random numbers
torch's own of the CPU, so that equal logits and a seed give the same token on every device.
"""

import math
from dataclasses import dataclass

import torch

from v4quant.errors import CheckFailedError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How to choose.

    Attributes:
        temperature: 0 takes the best token.
        top_p: share of the probability that is drawn from, above 0, at most 1.
        seed: of the random numbers.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check.

        Raises:
            UsageError: if a number is out of its range.
        """
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature is {self.temperature}, expected 0 or a positive number")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}, expected more than 0, at most 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}, expected 0 to {2**63 - 1}")


class Sampler:
    """Chooses one token after the other."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token.

        Args:
            logits: float32 [V].

        Raises:
            CheckFailedError: if any is NaN or infinite.
        """
        if not bool(logits.isfinite().all()):
            wrong = int((~logits.isfinite()).sum())
            raise CheckFailedError(
                f"{wrong:,} of {len(logits):,} logits are NaN or infinite: there is no next token",
                hint="Look for the layer that breaks with: v4quant reference SRC OUT --tokens FILE",
            )
        if self._sampling.temperature == 0:
            return int((logits == logits.max()).nonzero()[0])  # argmax may return any of equal ones
        shares, ids = self._kept(logits.cpu().double())
        bounds = shares.cumsum(0)  # [kept]
        draw = torch.rand((), dtype=torch.float64, generator=self._random) * bounds[-1]
        place = int(torch.searchsorted(bounds, draw, right=True))
        return int(ids[min(place, len(ids) - 1)])  # the product may round up to the last bound

    def _kept(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities, up to a factor, of the tokens that are drawn from, and their ids, best first."""
        values, ids = logits.sort(descending=True, stable=True)
        weights = ((values - values[0]) / self._sampling.temperature).exp()  # [V], the first is 1
        bounds = weights.cumsum(0)
        # A token stays if those before it hold less than top_p; and none stays that cannot be drawn.
        stays = (bounds - weights < self._sampling.top_p * bounds[-1]) & (weights > 0)
        stays[0] = True
        return weights[stays], ids[stays]
