"""Measured times of a recipe, as shares of the unpruned model's: both take turns."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from foveate.bench.speed import ALL, Bench, Contender, Rounds, measure_cell
from foveate.run import use
from foveate.tune.asking import Asker
from foveate.tune.planning import Recipe

_MINE = "recipe"
_SPEED_UPS = {"ttft": "ttft", "latency": "throughput"}


class Timer:
    """Times prompts of one question, as `foveate bench --speed` does.

    Args:
        asker: the model and its questions.
        number: which question.
        repeats: timed rounds.
        new_tokens: decoding steps of an answer.
    """

    def __init__(self, asker: Asker, number: int, repeats: int, new_tokens: int) -> None:
        self._model, self._repeats = asker.model, repeats
        self._inputs = asker.inputs([number])
        one_thread = self._model.device.type == "cpu" and torch.get_num_threads() == 1
        self._bench = Bench(self._model, new_tokens, cpu_time=one_thread)

    def shares(self, recipe: Recipe) -> dict[str, list[float]]:
        """Of `ttft` and `latency`: median, lower and upper quartile over rounds."""
        entrants = {
            ALL: Contender(nullcontext),
            _MINE: Contender(functools.partial(use, self._model, list(recipe))),
        }
        cell = measure_cell(self._bench, self._inputs, entrants, Rounds(self._repeats))
        speed = cell["rows"][_MINE]["speed_up"]
        return {name: _inverse(speed[of]) for name, of in _SPEED_UPS.items()}


def _inverse(spread: dict[str, float]) -> list[float]:
    return [1 / spread["median"], 1 / spread["q75"], 1 / spread["q25"]]


def medians(shares: dict[str, Sequence[float]]) -> dict[str, float]:
    """Of each time its median."""
    return {name: values[0] for name, values in shares.items()}
