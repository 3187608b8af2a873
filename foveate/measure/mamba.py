"""Mamba-2 as what mixes the tokens of a decoder layer; conventions and symbols as in `mixers`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.measure.mixers import Mixer, chunked, convolved


@dataclass(frozen=True)
class Mamba2(Mixer):
    """A state-space model (Mamba-2), as in Nemotron-H: a short convolution, and a state of a matrix
    for each head that fades with every token.

    A prompt runs over chunks; one new token after a cache updates the state alone. Decays and skips
    are single numbers of a channel, left out like norms.

    Args:
        hidden: D.
        heads: h.
        head_dim: p, the width of a head.
        state: n, numbers that a channel of a head keeps.
        groups: heads of one group share what they write to the state with, and read it with.
        taps: w.
        chunk: C, tokens of a chunk.
    """

    heads: int
    head_dim: int
    state: int
    groups: int
    taps: int
    chunk: int

    @property
    def _channels(self) -> int:
        """Values, and two vectors of each group, which pass the convolution: h p + 2 g n."""
        return self.heads * self.head_dim + 2 * self.groups * self.state

    def projections(self, tokens: int) -> int:
        """What passes the convolution, a gate, a number of each head, and output:
        2 T D (3 h p + 2 g n + h), with g groups.
        """
        widths = self._channels + 2 * self.heads * self.head_dim + self.heads
        return 2 * tokens * self.hidden * widths

    def mixing(self, tokens: int, keys: int | None = None, *, causal: bool = True) -> int:
        """The convolution, and in each head 4 p n for each token (what it writes to the state, and
        reads of it) and 2 (n + p) for each pair in a chunk. Torch also carries the states of chunks
        on to all others, 2 p n for each pair of chunks, the end among them.

        A step after a cache has no pairs; transformers writes to the state element by element,
        which torch does not count.
        """
        moved = convolved(self._channels, self.taps, tokens, keys, causal)
        alone = keys is not None and tokens == 1
        steps, pairs = (1, 0) if alone else chunked(tokens, self.chunk, causal)
        ends = 0 if alone or causal else (steps // self.chunk + 1) ** 2
        of_state = 2 * self.head_dim * self.state * (2 * steps + ends)
        inside = 2 * (self.state + self.head_dim) * pairs
        return moved + self.heads * (of_state + inside)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """The last w tokens of the convolution, and h p n numbers in 32 bits."""
        matrix = self.heads * self.head_dim * self.state * torch.float32.itemsize
        return self._channels * self.taps * dtype.itemsize + matrix
