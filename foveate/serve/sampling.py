"""Sampling: each row of a batch draws its tokens by itself, as it would alone."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from foveate.serve.request import Sampling


class RowSampling(LogitsProcessor):
    """Leaves each row that samples one token, the one that was drawn; `generate` stays greedy.

    Draws depend on the row's seed and its logits alone. Penalties that look at earlier tokens see
    the row without its padding, which alone it would not have.

    Args:
        rows: how each row samples.
        padding: columns before each row's prompt.
        config: the model's, for its penalties.
    """

    def __init__(
        self, rows: Sequence[Sampling], padding: Sequence[int], config: GenerationConfig
    ) -> None:
        self._rows = [_Draw(one) if one.temperature > 0 else None for one in rows]
        self._padding, self._penalties = list(padding), _penalties(config)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, vocabulary) logits, of which those that were not drawn are minus infinity."""
        if self._penalties:
            rows = [
                self._penalties(ids[None, start:], row[None])
                for ids, row, start in zip(input_ids, scores, self._padding, strict=True)
            ]
            scores = torch.cat(rows)
        drawn = {n: draw(scores[n]) for n, draw in enumerate(self._rows) if draw is not None}
        if not drawn:
            return scores
        scores = scores.clone()
        for row, token in drawn.items():
            scores[row] = -torch.inf
            scores[row, token] = 0
        return scores


class _Draw:
    """Draws of one row, made on the CPU, where a seed means the same everywhere."""

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
        self._nucleus = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, scores: Tensor) -> int:
        scores = scores.float().cpu()[None]
        scores = (scores - scores.max()) / self._temperature  # of which none is infinite but -inf
        if self._nucleus is not None:
            scores = self._nucleus(None, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def _penalties(config: GenerationConfig) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if config.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    return found


def greedy_config(config: GenerationConfig, max_tokens: int) -> GenerationConfig:
    """A model's settings for greedy batches, without what `RowSampling` does row by row."""
    values = config.to_dict()
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "max_length"):
        values.pop(name, None)
    changed = {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "repetition_penalty": None,
        "no_repeat_ngram_size": None,
        "max_new_tokens": max_tokens,
        "return_dict_in_generate": False,
    }
    return GenerationConfig.from_dict({**values, **changed})
