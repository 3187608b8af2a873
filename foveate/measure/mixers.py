"""What mixes the tokens of a decoder layer, by kind: its FLOPs and what it leaves in the cache.

Formulas are of transformers' modules; what counts is said in `flops`. Counted *causally* is what
the arithmetic needs, else what torch computes: query-key pairs in full.

Symbols: `T` tokens of a row in this forward, `S` keys it may see, `D` hidden, `h` query heads, `g`
key-value heads, `d` head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


def visible_keys(
    tokens: int, keys: int | None = None, *, causal: bool = True, window: int | None = None
) -> int:
    """Query-key pairs of one row: sum over the `T` queries of the keys each may see.

    Args:
        tokens: T, the last T of the keys are the queries' own.
        keys: S, keys in all; `None` means T, a prompt without a past.
        causal: whether a query sees only keys up to itself: T (S - T) + T (T + 1) / 2, else T S.
        window: keys that a query sees at most, if it is causal.
    """
    total = tokens if keys is None else keys
    if not causal:
        return tokens * total
    if window is None or total <= window:
        return tokens * (total - tokens) + tokens * (tokens + 1) // 2
    short = max(min(window - (total - tokens), tokens), 0)  # queries that see all before them
    return visible_keys(short, total - tokens + short) + (tokens - short) * window


@dataclass(frozen=True)
class Mixer(ABC):
    """What mixes the tokens of a decoder layer.

    Args:
        hidden: D.
    """

    hidden: int

    @abstractmethod
    def projections(self, tokens: int) -> int:
        """FLOPs of the matrices that every token passes."""

    @abstractmethod
    def mixing(self, tokens: int, keys: int | None = None, *, causal: bool = True) -> int:
        """FLOPs between the tokens of one row.

        Args:
            tokens: T.
            keys: S, the tokens' own included; `None` for a prompt without a past.
            causal: what the arithmetic needs, or what torch computes.
        """

    @abstractmethod
    def held(self, tokens: int) -> int:
        """Slots that the layer's cache keeps of so many tokens."""

    @property
    @abstractmethod
    def slot(self) -> int:
        """Numbers that a slot holds."""


@dataclass(frozen=True)
class Attention(Mixer):
    """Attention with grouped key-value heads.

    Args:
        hidden: D.
        heads: h.
        kv_heads: g.
        head_dim: d.
        window: keys that a query sees at most, itself included; `None` for all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None

    def projections(self, tokens: int) -> int:
        """Queries, keys, values and output: 2 T D (2 h d + 2 g d)."""
        widths = 2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim
        return 2 * tokens * self.hidden * widths

    def mixing(self, tokens: int, keys: int | None = None, *, causal: bool = True) -> int:
        """Q K^T and the weighted sum of values: 4 h d for each visible query-key pair."""
        pairs = visible_keys(tokens, keys, causal=causal, window=self.window)
        return 4 * self.heads * self.head_dim * pairs

    def held(self, tokens: int) -> int:
        """All tokens, or one less than the window, to which the next query adds itself."""
        return tokens if self.window is None else min(tokens, self.window - 1)

    @property
    def slot(self) -> int:
        """Keys and values: 2 g d."""
        return 2 * self.kv_heads * self.head_dim
