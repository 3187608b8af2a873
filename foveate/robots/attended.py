"""Attended: what the tokens of a prompt attend to in each layer, and how evenly.

Shapes: `B` rows of the batch, `T` tokens of the prompt, `P` of them that a layer computes, `H`
heads, `Hkv` key-value heads of width `d`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.signals.layer_view import rotary_function

CHUNK = 256  # queries whose attention is held at once


class Attended:
    """Notes of one pass of a prompt, whose tokens see all that are no padding.

    Args:
        real: (B, T) tokens that are no padding.
        words: (B, T) tokens of the instruction.
        reader: the layer in which the instruction's attention is noted.
    """

    def __init__(self, real: Tensor, words: Tensor, reader: int) -> None:
        self._real, self._words, self._reader = real, words, reader
        self._counted, self._asking = real, words
        self._queries: Tensor | None = None
        self.by_words: Tensor | None = None  # (B, T) mean over the instruction and over heads
        self.entropy: list[Tensor] = []  # (B) of each layer, the mean over computed tokens
        self.computed: list[float] = []  # share of the prompt's tokens that each layer computes

    def only(self, rows: Tensor, fresh: Tensor) -> None:
        """Layers compute these tokens alone from now on.

        Args:
            rows: (B, P) tokens.
            fresh: (B, P) which of them are no repetition.
        """
        self._counted = self._real.gather(1, rows) & fresh
        self._asking = self._words.gather(1, rows) & fresh

    def queried(self, output: Tensor) -> None:
        """Note (B, P, H d) what a layer's projection of queries has made."""
        self._queries = output

    def note(self, number: int, attention: Any, keys: Tensor, rotary: Any) -> None:
        """Note what a layer that has run attended to.

        Args:
            number: the decoder layer.
            attention: its attention module.
            keys: (B, Hkv, T, d) rotated.
            rotary: cos and sin of the tokens that it computed.
        """
        assert self._queries is not None  # as the layer has made some
        queries = self._queries.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        queries = rotary_function(attention)(queries, queries, *rotary)[0]
        queries = queries.unflatten(1, (keys.shape[1], -1))  # those of one key head together
        counted, asking = (x.to(keys.device).float() for x in (self._counted, self._asking))
        padding = ~self._real.to(keys.device)
        entropy, by_words = counted.new_zeros(len(keys)), counted.new_zeros(padding.shape)
        for start in range(0, counted.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            logits = (queries[..., part, :] @ keys[:, :, None].mT).float() * attention.scaling
            logits = logits.masked_fill(padding[:, None, None, None], -torch.inf)
            shares = logits.softmax(-1).mean((1, 2))
            entropy += (torch.special.entr(shares).sum(-1) * counted[:, part]).sum(1)
            if number == self._reader:
                by_words += (shares * asking[:, part, None]).sum(1)
        self.entropy.append(entropy / counted.sum(1).clamp(min=1))
        if number == self._reader:
            self.by_words = by_words / asking.sum(1, keepdim=True).clamp(min=1)
        self.computed.append(float(self._counted.sum() / self._real.sum()))
