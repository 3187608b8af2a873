"""How sure a share of right answers is, and how sure a difference of two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964  # two-sided 95 %


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927); (0, 1) where nothing was asked."""
    if not asked:
        return 0.0, 1.0
    share = right / asked
    middle = share + Z**2 / (2 * asked)
    half = Z * math.sqrt(share * (1 - share) / asked + Z**2 / (4 * asked**2))
    scale = 1 + Z**2 / asked
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions.

    Args:
        asked: questions.
        lost: right with the first, wrong with the second.
        won: wrong with the first, right with the second.
    """

    asked: int
    lost: int
    won: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> Paired:
        """Compare answer by answer."""
        pairs = list(zip(first, second, strict=True))
        lost = sum(a and not b for a, b in pairs)
        return cls(len(pairs), lost, sum(b and not a for a, b in pairs))

    @property
    def difference(self) -> float:
        """Share of right answers of the second less that of the first."""
        return (self.won - self.lost) / max(self.asked, 1)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the difference, by the normal approximation."""
        if not self.asked:
            return 1.0
        spread = self.won + self.lost - (self.won - self.lost) ** 2 / self.asked
        return Z * math.sqrt(max(spread, 0.0)) / self.asked

    @property
    def p(self) -> float:
        """Two-sided exact probability of such a difference by chance (McNemar 1947)."""
        changed, fewer = self.won + self.lost, min(self.won, self.lost)
        if not changed:
            return 1.0
        tail, ways = 0, 1  # of k changes in one direction; whole numbers, so nothing is rounded
        for k in range(fewer + 1):
            tail += ways
            ways = ways * (changed - k) // (k + 1)
        return min(1.0, 2 * tail / 2**changed)


def holm(chances: Sequence[float]) -> list[float]:
    """Probabilities of several tests, adjusted for how many there are (Holm 1979).

    Who takes all adjusted ones below `a` for differences errs at all with probability `a` at most.

    Args:
        chances: of each test on its own.

    Returns:
        One for each, in the same order; at most 1.
    """
    adjusted, least = [0.0] * len(chances), 0.0
    for done, number in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        least = max(least, min(1.0, (len(chances) - done) * chances[number]))
        adjusted[number] = least
    return adjusted
