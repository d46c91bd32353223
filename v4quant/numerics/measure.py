"""How much a cast rounded: relative errors, signal to noise, share of values changed, over any number of chunks.

Sums run in element order without reassociation, so one order of chunks gives the same numbers on every machine.
"""

# built on 6106a0e33205a6ee (see _kernel)

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from v4quant.numerics._kernel import kernel


@dataclass(frozen=True, slots=True)
class RoundingError:
    """The error of one tensor.

    Attributes:
        elements: values compared.
        changed: values that differ, in value or in the sign of zero.
        max_relative: largest |output - source| / |source| over non-zero source values.
        rms_relative: Frobenius norm of output - source over that of source; 0 where both are 0.
    """

    elements: int
    changed: int
    max_relative: float
    rms_relative: float

    @property
    def changed_share(self) -> float:
        """Share of values changed, 0 to 1."""
        return self.changed / self.elements if self.elements else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise ratio, 20 log10(1 / rms_relative), in dB; infinite without an error."""
        return math.inf if self.rms_relative == 0 else -20 * math.log10(self.rms_relative)


class RoundingMeter:
    """Accumulates the error of a tensor that comes in chunks."""

    def __init__(self) -> None:
        self._elements = 0
        self._changed = 0
        self._max_relative = 0.0
        self._error_energy = 0.0
        self._signal_energy = 0.0

    def add(self, source: npt.NDArray[np.floating[Any]], output: npt.NDArray[np.floating[Any]]) -> None:
        """Compare a chunk of decoded source values with the decoded output.

        Args:
            source, output: finite, the same shape; float64, or float32 where that holds the values exactly.

        Raises:
            ValueError: if the shapes differ.
        """
        if source.shape != output.shape:
            raise ValueError(f"output is {list(output.shape)}, expected {list(source.shape)}")
        changed, max_relative, error_energy, signal_energy = _compare(source.reshape(-1), output.reshape(-1))
        self._elements += source.size
        self._changed += changed
        self._max_relative = max(self._max_relative, max_relative)
        self._error_energy += error_energy
        self._signal_energy += signal_energy

    def result(self) -> RoundingError:
        """The error of everything added so far."""
        if self._error_energy == 0:
            rms = 0.0
        else:
            rms = math.sqrt(self._error_energy / self._signal_energy) if self._signal_energy else math.inf
        return RoundingError(self._elements, self._changed, self._max_relative, rms)


@kernel
def _compare(
    source: npt.NDArray[np.floating[Any]], output: npt.NDArray[np.floating[Any]]
) -> tuple[int, float, float, float]:
    """Values changed, largest relative error, sums of squares of the error and of the source."""
    changed, max_relative, error_energy, signal_energy = 0, 0.0, 0.0, 0.0
    for i in range(source.size):
        before, after = np.float64(source[i]), np.float64(output[i])
        error = after - before
        signal_energy += before * before
        if error != 0:
            changed += 1
            error_energy += error * error
            if before != 0:
                max_relative = max(max_relative, abs(error / before))
        elif math.copysign(1.0, before) != math.copysign(1.0, after):
            changed += 1
    return changed, max_relative, error_energy, signal_energy
