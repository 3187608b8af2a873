"""Image features: reduce them after the projector, and mark what was removed.

A removed token is a row of NaN in features of full length, so that placeholder counts, packing and
beam expansion see what they expect. The text model's first layer drops marked rows; a path that
forgets to fails loudly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.engine.images import Group, group_features, reduce_group
from foveate.engine.plan import Plan
from foveate.errors import UnsupportedModelError
from foveate.models import Family
from foveate.reduction import take_rows


@dataclass(frozen=True, eq=False)
class Signals:
    """What the encoder said about each image, kept until the reduction can run.

    Args:
        features: the projected features of each image, to recognise them after beam expansion.
        class_attention: layer -> (images, H, V).
        pixels: what the encoder was fed.
        kept: place inside the encoder -> (images, K) raster positions alive behind it, ascending.
    """

    features: tuple[Tensor, ...]
    class_attention: dict[int, Tensor]
    pixels: Tensor | None
    kept: dict[str, Tensor] = field(default_factory=dict)
    _marked: list[tuple[Tensor, int]] = field(default_factory=list)

    def check(self) -> None:
        """Refuse features that are not one row for each patch that the encoder saw.

        Raises:
            UnsupportedModelError: they are not, so what the encoder removed cannot be marked.
        """
        for kept in self.kept.values():
            if len(kept) != len(self.features):
                raise UnsupportedModelError(
                    f"the encoder ran on {len(kept)} images, but the language model is given "
                    f"{len(self.features)} blocks of features, so what was removed inside the "
                    "encoder cannot be followed; use a method of the pre_llm or llm stage"
                )

    def number(self, feature: Tensor) -> int:
        """Which image of the encoder's pass some features belong to, marked or not."""
        known = [*zip(self.features, range(len(self.features)), strict=True), *self._marked]
        return next(number for mine, number in known if mine is feature)

    def mark(self, features: Sequence[Tensor], marked: Sequence[Tensor]) -> None:
        """Note what the features of each image have become."""
        pairs = zip(features, marked, strict=True)
        self._marked.extend((after, self.number(before)) for before, after in pairs)

    def alive(self, features: Sequence[Tensor]) -> list[Tensor] | None:
        """(K) raster positions that the encoder has left of each image; `None` for all."""
        last = list(self.kept.values())[-1:]
        return [last[0][self.number(feature)] for feature in features] if last else None

    def kept_of(self, feature: Tensor) -> dict[str, Tensor]:
        """Place inside the encoder -> (K) raster positions of an image alive behind it."""
        if not self.kept:
            return {}
        number = self.number(feature)
        return {place: kept[number] for place, kept in self.kept.items()}


@functools.cache
def _tagged(kind: Any) -> Any:
    return type(
        f"Foveated{kind.__name__}", (kind,), {"foveated": True, "signals": None, "marked": False}
    )


def tag(output: Any, signals: Signals) -> None:
    """Make an encoder output carry its signals.

    The class survives whatever `generate` does to the output; the attributes are lost when chunked
    prefill slices it, which is how a slice is recognised.
    """
    output.__class__ = _tagged(type(output))  # type: ignore[arg-type]
    output.signals, output.marked = signals, False


def is_tagged(output: Any) -> bool:
    """Whether an encoder output went through a session, whole or in part."""
    return getattr(output, "foveated", False)


def is_slice(output: Any) -> bool:
    """Whether the output is a part of a tagged one, as chunked prefill makes them."""
    return is_tagged(output) and output.signals is None


def reduce_features(
    plan: Plan,
    family: Family,
    features: Sequence[Tensor],
    rows: Sequence[int],
    signals: Signals | None,
    request: Callable[[int], int],
) -> list[Tensor]:
    """Run all pre_llm steps on the features of some images.

    Args:
        plan: the session's plan.
        family: the model's family.
        features: (V, D) of each image.
        rows: row of the batch of each image; any number where budgets do not depend on it.
        signals: from the encoder; `None` if features were made outside the session.
        request: batch row to entry of a per-request budget.

    Returns:
        (V, D) of each image with removed tokens marked; an image that loses nothing is returned as
        it is.
    """
    begin: dict[tuple[int, int], int] = {}
    left = None if signals is None else signals.alive(features)
    alive = [
        (group, take_rows(torch.stack([features[i] for i in group.images]), group.index))
        for group in group_features(features, rows, left)
    ]
    for planned in plan.pre_llm:
        after = []
        for group, x in alive:
            place = {image: i for i, image in enumerate(group.images)}

            def values(part: Group, x: Tensor = x, place: dict[int, int] = place) -> Tensor:
                return x[[place[image] for image in part.images]]

            def wanted(part: Group) -> dict[str, Tensor]:
                return {
                    need.name: _class_attention(signals, features, part, need.layers)
                    for need in planned.step.needs  # noqa: B023  called within this iteration
                }

            for part, reduced, reduction in reduce_group(
                planned, family, group, begin, request, values, wanted
            ):
                part_values = values(part)
                after.append(
                    (reduced, part_values if reduction is None else reduction.apply(part_values))
                )
        alive = after
    result = list(features)
    for group, x in alive:
        if group.index.shape[1] == group.total:
            continue
        for i, image in enumerate(group.images):
            marked = torch.full_like(features[image], torch.nan)
            result[image] = marked.index_copy(0, group.index[i], x[i])
    if signals is not None and signals.kept:
        signals.mark(features, result)
    return result


def _class_attention(
    signals: Signals | None, features: Sequence[Tensor], part: Group, layers: tuple[int, ...]
) -> Tensor:
    """(G, L, H, V) class-token attention of a group, at the tokens alive."""
    assert signals is not None  # the session refuses foreign features before it comes here
    images = [signals.number(features[image]) for image in part.images]
    rows = torch.stack([signals.class_attention[layer][images] for layer in layers], dim=1)
    index = part.index[:, None, None].expand(-1, rows.shape[1], rows.shape[2], -1)
    return rows.gather(3, index.to(rows.device))
