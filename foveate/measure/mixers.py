"""What mixes the tokens of a decoder layer, by kind: its FLOPs and what it leaves in the cache.

Formulas are of transformers' modules; what counts is said in `flops`. Counted *causally* is what
the arithmetic needs, else what torch computes: query-key pairs in full, chunks and convolutions
with their padding.

Symbols: `T` tokens of a row in this forward, `S` keys it may see, `D` hidden, `h` query heads, `g`
key-value heads, `d` head width, `w` taps of a convolution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


def visible_keys(
    tokens: int,
    keys: int | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
) -> int:
    """Query-key pairs of one row: sum over the `T` queries of the keys each may see.

    Args:
        tokens: T, the last T of the keys are the queries' own.
        keys: S, keys in all; `None` means T, a prompt without a past.
        causal: whether a query sees only keys up to itself: T (S - T) + T (T + 1) / 2, else T S.
        window: keys that a query sees at most, if it is causal.
        chunk: keys of a chunk, of which a query sees its own alone, if it is causal.
    """
    total = tokens if keys is None else keys
    if not causal:
        return tokens * total
    if chunk is not None:
        return _in_chunks(total, chunk) - _in_chunks(total - tokens, chunk)
    if window is None or total <= window:
        return tokens * (total - tokens) + tokens * (tokens + 1) // 2
    short = max(min(window - (total - tokens), tokens), 0)  # queries that see all before them
    return visible_keys(short, total - tokens + short) + (tokens - short) * window


def _in_chunks(tokens: int, chunk: int) -> int:
    """Query-key pairs of the first tokens of a row: C (C + 1) / 2 in each chunk of C."""
    whole, rest = divmod(tokens, chunk)
    return whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2


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

    def held(self, tokens: int) -> int:
        """Slots that the layer's cache keeps of so many tokens."""
        return 0

    @property
    def slot(self) -> int:
        """Numbers that a slot holds in the model's type."""
        return 0

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a slot.

        Args:
            dtype: of the model.
        """
        return self.slot * dtype.itemsize

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the running state of a row, whatever its length.

        Args:
            dtype: of the model.
        """
        return 0


@dataclass(frozen=True)
class Attention(Mixer):
    """Attention with grouped key-value heads.

    Args:
        hidden: D.
        heads: h.
        kv_heads: g.
        head_dim: d.
        window: keys that a query sees at most, itself included; `None` for all.
        gated: whether the query matrix makes a gate of the output too, as in Qwen3.5.
        shared: whether keys and values are those of an earlier layer, which caches them, as in the
            last layers of Gemma 4.
        keys_are_values: whether one matrix makes both, as in full layers of Gemma 4 26B.
        gate: columns of a matrix of its own that makes a gate of the output, as in Step 3.7.
        chunk: tokens of a chunk, of which a query sees its own alone, as in Llama 4; `None` for
            all. Where tokens were removed, it is as if those left were in chunks anew.
        both_ways: whether a query sees the keys after itself too, as many as before. Then `window`
            counts one side, the query included.
        fused: whether one matrix makes queries, keys and values, so that none comes alone.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    gated: bool = False
    shared: bool = False
    keys_are_values: bool = False
    gate: int = 0
    chunk: int | None = None
    both_ways: bool = False
    fused: bool = False

    @property
    def query_width(self) -> int:
        """Columns of the query matrix: h d, with a gate 2 h d."""
        return self.heads * self.head_dim * (2 if self.gated else 1)

    def projections(self, tokens: int) -> int:
        """Queries, keys, values and output: 2 T D (2 h d + 2 g d); with a gate h d more, with one
        matrix for keys and values g d less, with another layer's 2 g d less; and a gate's own.
        """
        made = 0 if self.shared else 1 if self.keys_are_values else 2
        output = self.heads * self.head_dim
        widths = self.query_width + output + made * self.kv_heads * self.head_dim + self.gate
        return 2 * tokens * self.hidden * widths

    def mixing(self, tokens: int, keys: int | None = None, *, causal: bool = True) -> int:
        """Q K^T and the weighted sum of values: 4 h d for each visible query-key pair."""
        reach = {"window": self.window, "chunk": self.chunk}
        pairs = visible_keys(tokens, keys, causal=causal, **reach)
        if self.both_ways and causal:
            pairs = 2 * pairs - tokens
        return 4 * self.heads * self.head_dim * pairs

    def held(self, tokens: int) -> int:
        """All tokens, or one less than the window or chunk, to which the next query adds itself;
        none where another layer holds them, or where no token comes next because all see all.
        """
        if self.shared or self.both_ways:
            return 0
        reach = self.window or self.chunk
        return tokens if reach is None else min(tokens, reach - 1)

    @property
    def slot(self) -> int:
        """Keys and values: 2 g d."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class GatedDeltaNet(Mixer):
    """Linear attention by the gated delta rule, as in Qwen3.5: a short convolution, and a state of
    a matrix for each value head.

    The rule runs over chunks of `CHUNK` tokens; one new token after a cache updates the state
    alone. Solving the triangular system of a chunk is left out, as torch leaves it out: it is below
    one percent of the layer. Gates and decays are single numbers of a head, left out like norms.

    Args:
        hidden: D.
        key_heads: heads of queries and keys.
        value_heads: h.
        key_dim: k, the width of a query or key.
        value_dim: v, the width of a value.
        taps: w.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    CHUNK = 64

    @property
    def _channels(self) -> int:
        """Queries, keys and values, which pass the convolution."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def projections(self, tokens: int) -> int:
        """Queries, keys, values, output gate, two numbers of each head, and output:
        2 T D (2 g k + 3 h v + 2 h), with g key heads.
        """
        values = self.value_heads * self.value_dim
        widths = self._channels + 2 * values + 2 * self.value_heads
        return 2 * tokens * self.hidden * widths

    def mixing(self, tokens: int, keys: int | None = None, *, causal: bool = True) -> int:
        """The convolution, and in each head 6 k v for each token (what it reads of the state, once
        as a key and once as a query, and what it writes) and 4 k + 2 v for each pair in a chunk.

        A step after a cache has no pairs; transformers writes its products element by element,
        which torch does not count.
        """
        moved = convolved(self._channels, self.taps, tokens, keys, causal)
        alone = keys is not None and tokens == 1
        steps, pairs = (1, 0) if alone else chunked(tokens, self.CHUNK, causal)
        state = 6 * self.key_dim * self.value_dim * steps
        inside = (4 * self.key_dim + 2 * self.value_dim) * pairs
        return moved + self.value_heads * (state + inside)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """The last w tokens of the convolution, and h k v numbers in 32 bits, in which transformers
        keeps the state of every model.
        """
        matrix = self.value_heads * self.key_dim * self.value_dim * torch.float32.itemsize
        return self._channels * self.taps * dtype.itemsize + matrix


@dataclass(frozen=True)
class Unmixed(Mixer):
    """Nothing: the layer is an MLP alone."""

    def projections(self, tokens: int) -> int:
        """None."""
        return 0

    def mixing(self, tokens: int, keys: int | None = None, *, causal: bool = True) -> int:
        """None."""
        return 0


@dataclass(frozen=True)
class ShortConvolution(Mixer):
    """A gated convolution over the last tokens, as in LFM2.

    Args:
        hidden: D.
        taps: w.
    """

    taps: int

    def projections(self, tokens: int) -> int:
        """Two gates, input and output: 8 T D^2."""
        return 8 * tokens * self.hidden**2

    def mixing(self, tokens: int, keys: int | None = None, *, causal: bool = True) -> int:
        """The convolution: 2 w D for each token."""
        return convolved(self.hidden, self.taps, tokens, keys, causal)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """The last w tokens."""
        return self.hidden * self.taps * dtype.itemsize


def convolved(channels: int, taps: int, tokens: int, keys: int | None, causal: bool) -> int:
    """A convolution of each channel by itself: 2 w for each token; torch pads both sides by w - 1
    and computes w - 1 tokens more, of which it drops the last.
    """
    if causal or keys is not None:
        return 2 * channels * taps * tokens
    return 2 * channels * taps * (max(tokens, taps) + taps - 1)


def chunked(tokens: int, chunk: int, causal: bool) -> tuple[int, int]:
    """Tokens, and pairs of tokens of one chunk; torch fills up the last chunk and computes all
    pairs.
    """
    whole, rest = divmod(tokens, chunk)
    if causal:
        return tokens, whole * visible_keys(chunk) + visible_keys(rest)
    chunks = whole + (rest > 0)
    return chunks * chunk, chunks * chunk**2
