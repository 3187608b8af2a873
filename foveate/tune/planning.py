"""What a recipe would cost, from counts alone, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foveate.core import Method
from foveate.engine.planning import plain_plan
from foveate.errors import FoveateError
from foveate.families import find_family
from foveate.measure.account import account, unpruned
from foveate.measure.flops import kv_bytes
from foveate.measure.planned import fed, planned
from foveate.record.record import Record

LEAST = 0.004
"""The smallest scale that is tried, of 1."""
TRIES = 8
"""Scales that are tried at most, between the least and everything."""
ENOUGH = 0.985
"""A recipe that uses this share of what a limit allows is not scaled further."""

Recipe = tuple[Method, ...]
Sketch = Callable[[float], Recipe]
"""A recipe that is still to be scaled: of a scale in (0, 1] makes methods; larger keeps more."""


class Planner:
    """Shares of the unpruned model's FLOPs and cache bytes, by the account of `foveate flops`.

    Args:
        model: the model.
        processor: its processor.
        images: images of a prompt.
        size: width and height of each.
        text_tokens: of the prompt.
    """

    def __init__(
        self, model: Any, processor: Any, images: int, size: tuple[int, int], text_tokens: int
    ) -> None:
        self.family = find_family(model)
        self._text = text_tokens
        self._given = fed(self.family, processor.image_processor, images, size)
        full = unpruned(self._record(()))
        self.tokens = full.images[0].total
        self._full = account(full, self.family, ()).total, self._bytes(full)

    def shares(self, recipe: Recipe) -> dict[str, float]:
        """`flops` and `kv` of a recipe.

        Raises:
            FoveateError: it does not work on the model.
        """
        record = self._record(recipe)
        work = account(record, self.family, recipe).total
        return {"flops": work / self._full[0], "kv": self._bytes(record) / self._full[1]}

    def _record(self, recipe: Recipe) -> Record:
        plan = plain_plan(self.family, recipe)
        return planned(self.family, plan, self._given, self._text)

    def _bytes(self, record: Record) -> int:
        return kv_bytes(self.family, record.cache_slots, 1, torch.float16)


@dataclass(frozen=True)
class Scaled:
    """A sketch at the largest scale that keeps to the limits.

    Args:
        recipe: the methods; empty where there are none.
        shares: what they cost by the account.
        why_not: why there are none.
    """

    recipe: Recipe
    shares: dict[str, float]
    why_not: str = ""

    def within(self, limits: Mapping[str, float]) -> bool:
        """Whether it is a recipe that keeps to limits."""
        return bool(self.recipe) and self.nearest(limits) <= 1

    def nearest(self, limits: Mapping[str, float]) -> float:
        """The largest share of a limit that it uses."""
        return max((self.shares[name] / limit for name, limit in limits.items()), default=0.0)


def scale(sketch: Sketch, limits: Mapping[str, float], planner: Planner) -> Scaled:
    """Keep as much as limits allow.

    Args:
        sketch: what is to be scaled.
        limits: largest shares, of `flops` and `kv`.
        planner: knows what it costs.
    """
    low, high = _try(sketch, LEAST, planner), _try(sketch, 1.0, planner)
    if high.within(limits):
        return high
    if low.recipe and not low.within(limits):
        return Scaled((), low.shares, _too_much(low.shares, limits))
    if not low.recipe and not high.recipe:
        return high
    bottom, top = LEAST, 1.0
    for number in range(TRIES):
        point = (bottom + top) / 2
        if low.recipe and high.recipe and number % 2 == 0:
            point = _between((bottom, low), (top, high), limits)
        tried = _try(sketch, point, planner)
        if tried.recipe and not tried.within(limits):
            top, high = point, tried
            continue
        bottom, low = point, tried  # it fits, or the method refuses to keep so little
        if tried.recipe and tried.nearest(limits) > ENOUGH:
            break
    if low.recipe or not high.recipe:
        return low
    return Scaled((), high.shares, low.why_not or _too_much(high.shares, limits))


def _try(sketch: Sketch, point: float, planner: Planner) -> Scaled:
    try:
        recipe = sketch(point)
        return Scaled(recipe, planner.shares(recipe))
    except FoveateError as error:
        return Scaled((), {}, str(error))


def _between(
    low: tuple[float, Scaled], high: tuple[float, Scaled], limits: Mapping[str, float]
) -> float:
    """Where the limit would be met if costs grew in a straight line."""
    (bottom, small), (top, large) = low, high
    parts = [
        (limit - small.shares[name]) / (large.shares[name] - small.shares[name])
        for name, limit in limits.items()
        if large.shares[name] > limit
    ]
    return bottom + (top - bottom) * min(parts) * 0.995


def _too_much(shares: Mapping[str, float], limits: Mapping[str, float]) -> str:
    over = [f"{n} {shares[n]:.2f}x of {limits[n]:.3g}x" for n in limits if shares[n] > limits[n]]
    return f"by the account it needs more than is allowed: {', '.join(over)}"


def typical(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size with the median number of pixels."""
    return sorted(sizes, key=lambda size: (size[0] * size[1], size))[len(sizes) // 2]
