"""`keep_total`: how many tokens each image may have, where those of a row are limited together.

Images of earlier turns count, as far as a cache still holds them. Shapes: `G` images of a group,
`V` tokens of each, `K` survivors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.core import Adaptive
from foveate.core.budget import Total, divide
from foveate.engine.images import ImageGroup
from foveate.engine.plan import Plan, PlannedStep
from foveate.errors import BudgetError, CacheError
from foveate.io.quoting import none_of

IMAGES = "images"  # attached to a cache layer: `CachedImages`
Columns = Sequence[Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class CachedImages:
    """The images that a cache holds.

    Args:
        columns: of each row, of each of its images from the oldest on, (K) logical positions of its
            tokens, those to keep longest first.
    """

    columns: Columns

    def rows(self, pick: Callable[[Tensor], Tensor]) -> CachedImages:
        """The images of other rows; see `PrunedLayer.attach`."""
        numbers = pick(torch.arange(len(self.columns)))
        return CachedImages([self.columns[number] for number in numbers.tolist()])


def cached_images(cache: Any, past: int, rows: int) -> Columns:
    """Of each row, of each image that a cache holds, its tokens; see `CachedImages`.

    Raises:
        CacheError: the cache holds what nobody has counted.
    """
    if not past:
        return [[] for _ in range(rows)]
    attached = (getattr(layer, "attached", {}).get(IMAGES) for layer in cache.layers)
    found = next((images for images in attached if images is not None), None)
    if found is None:
        raise CacheError(
            "keep_total counts the visual tokens of earlier turns, but this KV cache was filled "
            "outside of a session with keep_total, or took new images in one; start with a new "
            "cache and give it the whole conversation"
        )
    return [
        [seen for columns in row if len(seen := columns[columns < past])] for row in found.columns
    ]


def forget_images(cache: Any) -> None:
    """Note that a cache takes images that nobody counts."""
    for layer in () if cache is None else cache.layers:
        if IMAGES in getattr(layer, "attached", {}):
            layer.attach(IMAGES, None)


@dataclass(frozen=True)
class Room:
    """What the rows of a forward may hold, and what they hold already.

    Args:
        totals: visual tokens that each row may hold.
        earlier: of each row, tokens of each image of earlier turns, oldest first.
    """

    totals: Sequence[int]
    earlier: Sequence[Sequence[int]]

    @classmethod
    def of(
        cls, total: Total, cache: Any, past: int, rows: int, request_of: Callable[[int], int]
    ) -> Room:
        """The room of a forward.

        Args:
            total: `keep_total` of the session.
            cache: the cache, or `None`.
            past: its logical length.
            rows: of the forward.
            request_of: row to entry of `total`, where that has one for each row.

        Raises:
            CacheError: see `cached_images`.
        """
        if isinstance(total, tuple):
            totals = [total[request_of(row)] for row in range(rows)]
        else:
            totals = [total] * rows
        held = cached_images(cache, past, rows)
        return cls(totals, [[len(columns) for columns in row] for row in held])

    def share(self, row: int, wants: Sequence[int]) -> tuple[list[int], list[int]]:
        """Tokens of a row's earlier images, and of its new ones, oldest first.

        Args:
            row: the row.
            wants: tokens that each new image would have without a total.

        Raises:
            BudgetError: there is not one token for each image.
        """
        earlier, total = self.earlier[row], self.totals[row]
        everything = [*earlier, *wants]
        images = sum(want > 0 for want in everything)
        if images > total:
            raise BudgetError(
                f"keep_total={total} leaves less than one visual token for each of the {images} "
                f"images of row {row} (each tile of an image that the processor cuts into tiles "
                "is one); raise keep_total, or begin a new conversation"
            )
        counts = divide(everything, total)
        return counts[: len(earlier)], counts[len(earlier) :]


def check_total(plan: Plan) -> None:
    """Refuse a total that the methods of a plan cannot keep to.

    Raises:
        BudgetError: nothing acts before the language model, or the last method that does decides by
            itself how many tokens survive.
    """
    if plan.total is None:
        return
    if not plan.pre_llm:
        idle = none_of((method.slug for method in plan.methods), "act")
        raise BudgetError(
            f"keep_total lowers what is kept before the language model, where {idle}; put a method "
            "there that does, such as 'divprune', or 'uniform' with keep=1.0, in a list in stream "
            "order"
        )
    last = plan.pre_llm[-1].method
    if isinstance(last, Adaptive):
        raise BudgetError(
            f"keep_total lowers the budgets of images, but {last.slug} decides by itself how many "
            f"tokens survive; put 'uniform' with keep=1.0 after it, or use a method with a budget, "
            "such as 'divprune'"
        )


def check_modalities(plan: Plan, visual: Mapping[str, Tensor]) -> None:
    """Refuse prompts whose images are reduced before it is known how many tokens videos have.

    Args:
        plan: the plan.
        visual: modality -> its placeholders.

    Raises:
        BudgetError: there is a total, and there are images and videos.
    """
    if plan.total is not None and len(visual) > 1:
        raise BudgetError(
            f"keep_total is not divided among {' and '.join(visual)}s of one prompt; give them in "
            "turns of their own, after the cache of the turn before, or leave keep_total out"
        )


# -- new images


def limited(groups: Sequence[ImageGroup], planned: PlannedStep, room: Room) -> list[ImageGroup]:
    """Groups whose images know how many tokens they may have after a step, if that is fewer than
    the method would leave them.

    Raises:
        BudgetError: see `Room.share`.
    """
    wants: dict[int, dict[int, int]] = {}  # row -> number of an image -> tokens that it wants
    for group in groups:
        counts = group.by_count(planned) if group.count else {0: list(range(len(group.images)))}
        for count, members in counts.items():
            for image in (group.images[member] for member in members):
                wants.setdefault(image.row, {})[image.number] = count
    most: dict[int, int] = {}
    for row, of_row in wants.items():
        numbers = sorted(of_row)
        shares = room.share(row, [of_row[number] for number in numbers])[1]
        most |= {n: m for n, m in zip(numbers, shares, strict=True) if m < of_row[n]}
    return [
        group
        if most.keys().isdisjoint(group.numbers)
        else replace(group, images=tuple(replace(i, most=most.get(i.number)) for i in group.images))
        for group in groups
    ]


def check_kept(group: ImageGroup, planned: PlannedStep) -> None:
    """Refuse a method that leaves more tokens of an image than it was told.

    Raises:
        BudgetError: so it has.
    """
    for image in group.images:
        if image.most is not None and group.count > image.most:
            raise BudgetError(
                f"keep_total leaves {image.most} tokens to image {image.number} of this prompt, "
                f"but {planned.method.slug} keeps {group.count}, by a rule of its own; put "
                "'uniform' with keep=1.0 after it"
            )


def ranking(
    planned: PlannedStep,
    before: ImageGroup,
    after: ImageGroup,
    features: Callable[[], Tensor],
    signals: Mapping[str, Tensor],
) -> Tensor:
    """(G, K) the survivors of a step in places of 0 to K - 1, those to keep longest first.

    The method is asked for half of them, a quarter, and so on down to one token: the longer it
    keeps a token, the longer that stays. Those that it keeps equally long go so that those left
    lie evenly in raster order.

    Args:
        planned: the step.
        before: G images before it.
        after: the same images after it.
        features: returns (G, V, D) of the images before it.
        signals: what the step declared in `needs`.
    """
    depth = torch.zeros_like(before.index.new_empty(len(before.images), before.shape.total))
    count, bits = after.count // 2, max(after.count - 1, 1).bit_length()
    while count:
        shown = before.visual_tokens(planned, features, signals, quota=count)
        kept = planned.method.reduce(shown, count).index
        where = before.index.gather(1, kept)
        depth.scatter_add_(1, where, torch.ones_like(where))
        count //= 2
    spread = [int(f"{place:0{bits}b}"[::-1], 2) for place in range(after.count)]
    last = torch.tensor(spread, device=depth.device) - (depth.gather(1, after.index) << bits)
    return last.argsort(dim=1)
