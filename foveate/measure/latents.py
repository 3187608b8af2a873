"""What attention through latents (MLA) costs, and such attention with an indexer (DSA)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from foveate.measure.mixers import Mixer, visible_keys


@dataclass(frozen=True)
class LatentAttention(Mixer):
    """Attention with compressed keys and values (MLA), as in DeepSeek-V3 and Kimi K2.

    The cache holds what keys and values are made of, and all of it is expanded again in each
    forward, as transformers does; kernels that absorb the expansion into the queries do otherwise.

    Args:
        hidden: D.
        heads: h.
        query_rank: width that queries pass; `None` for one matrix.
        rank: r, the width of what keys and values are made of.
        rotary: p, the width of the key that all heads share, with rotary positions.
        plain: n, the width of a head's key without positions.
        value: v, the width of a head's value.
        window: keys that a query sees at most, itself included; `None` for all.
        gate: columns of a matrix that makes a gate of the output, as in Dots 3 Note.
    """

    heads: int
    query_rank: int | None
    rank: int
    rotary: int
    plain: int
    value: int
    window: int | None = None
    gate: int = 0

    @property
    def query_width(self) -> int:
        """Width of all queries: h (n + p)."""
        return self.heads * (self.plain + self.rotary)

    @property
    def query(self) -> int:
        """Multiply-adds that make the queries of a token: D h (n + p), or through their rank q
        q (D + h (n + p)).
        """
        if self.query_rank is None:
            return self.hidden * self.query_width
        return self.query_rank * (self.hidden + self.query_width)

    @property
    def compressed(self) -> int:
        """Multiply-adds that make what the cache holds of a token: D (r + p)."""
        return self.hidden * (self.rank + self.rotary)

    @property
    def expanded(self) -> int:
        """Multiply-adds that make keys and values of it: r h (n + v)."""
        return self.rank * self.heads * (self.plain + self.value)

    def projections(self, tokens: int) -> int:
        """Queries, the compressed, output 2 T h v D, and a gate."""
        output = (self.heads * self.value + self.gate) * self.hidden
        return 2 * tokens * (self.query + self.compressed + output)

    def mixing(self, tokens: int, keys: int | None = None, *, causal: bool = True) -> int:
        """Expanding all keys and values, 2 S r h (n + v), and 2 h (n + p + v) for each pair."""
        past = self.held((tokens if keys is None else keys) - tokens)
        width, window = self.query_width + self.heads * self.value, self.window
        pairs = visible_keys(tokens, keys, causal=causal, window=window)
        return 2 * (past + tokens) * self.expanded + 2 * width * pairs

    def held(self, tokens: int) -> int:
        """All tokens, or one less than the window."""
        return tokens if self.window is None else min(tokens, self.window - 1)

    @property
    def slot(self) -> int:
        """The compressed: r + p, whatever the heads."""
        return self.rank + self.rotary


@dataclass(frozen=True)
class IndexedAttention(LatentAttention):
    """Latent attention to the keys that an indexer chooses for each query (DSA), as in Dots 3 Note.

    The indexer scores every visible key: its heads share one key of a token, and a head of a query
    counts as much as a matrix says. Torch computes all query-key pairs, and masks those not chosen.

    Args:
        chosen: keys that a query sees at most.
        index_heads: i, heads of the indexer.
        index_width: w, the width of its heads, and of the key that the cache holds beside.
    """

    chosen: int = field(kw_only=True)
    index_heads: int = field(kw_only=True)
    index_width: int = field(kw_only=True)

    def projections(self, tokens: int) -> int:
        """Beside those of latent attention, the indexer's queries 2 T q i w (of the width q that
        queries pass), its key 2 T D w, and its weights 2 T D i.
        """
        source = self.hidden if self.query_rank is None else self.query_rank
        made = source * self.index_heads * self.index_width
        beside = self.hidden * (self.index_width + self.index_heads)
        return super().projections(tokens) + 2 * tokens * (made + beside)

    def mixing(self, tokens: int, keys: int | None = None, *, causal: bool = True) -> int:
        """The indexer's scores, 2 i (w + 1) for each visible pair, and latent attention, of which
        the arithmetic needs the chosen pairs.
        """
        scored = 2 * self.index_heads * (self.index_width + 1)
        width = self.query_width + self.heads * self.value
        seen = visible_keys(tokens, keys, causal=causal)
        pairs = visible_keys(tokens, keys, causal=causal, window=self.chosen)
        total = tokens if keys is None else keys
        return scored * seen + 2 * total * self.expanded + 2 * width * pairs

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """The compressed, and w numbers of the indexer's key in 32 bits: its rotary positions are
        so in models of any type.
        """
        return super().slot_bytes(dtype) + self.index_width * torch.float32.itemsize
