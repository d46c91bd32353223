"""What a cast found out about its own exactness."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CastCheck:
    """Counts of one cast, or of several merged.

    Attributes:
        inexact: elements whose decoded output differs from the source in value or in the sign of zero.
        negative_zeros_lost: those of them that were -0 and became +0.
        worst_spread: FP4 -> FP8 only: the largest spread between the scales of one 128x128 block, as a power of two;
            groups that hold only zeros do not count.
    """

    inexact: int = 0
    negative_zeros_lost: int = 0
    worst_spread: int | None = None

    def merged(self, other: "CastCheck") -> "CastCheck":
        """The check of both casts together."""
        spreads = [spread for spread in (self.worst_spread, other.worst_spread) if spread is not None]
        return CastCheck(
            self.inexact + other.inexact,
            self.negative_zeros_lost + other.negative_zeros_lost,
            max(spreads, default=None),
        )
