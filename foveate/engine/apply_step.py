"""One step on a group of images: how many tokens survive, and what the method makes of them.

Shapes: `G` images of a group, `V` tokens of each, `D` hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor

from foveate.core import Adaptive, Reduction, VisualTokens
from foveate.engine.images import Group
from foveate.engine.plan import PlannedStep
from foveate.engine.readout import reduce_around, spared


def split_by_count(
    planned: PlannedStep,
    group: Group,
    begin: Mapping[tuple[int, int], int],
    request: Callable[[int], int],
) -> dict[int, list[int]]:
    """Count of survivors -> members of a group.

    Args:
        planned: the step.
        group: images alive.
        begin: tokens of (method, image) where the method began, if it has begun.
        request: batch row to entry of a per-request budget.
    """
    parts: dict[int, list[int]] = defaultdict(list)
    alive = group.index.shape[1]
    for member, (image, row) in enumerate(zip(group.images, group.rows, strict=True)):
        total = begin.get((planned.method_number, image), alive)
        wanted = planned.method.count(alive, total, planned.step, planned.number, request(row))
        parts[wanted].append(member)
    return parts


def reduce_group(
    planned: PlannedStep,
    group: Group,
    begin: dict[tuple[int, int], int],
    request: Callable[[int], int],
    features: Callable[[Group], Tensor],
    signals: Callable[[Group], Mapping[str, Tensor]],
    unasked: Collection[int] = (),
) -> list[tuple[Group, Group, Reduction | None]]:
    """Let a method reduce a group at one step.

    Args:
        planned: the step.
        group: images alive.
        begin: tokens of (method, image) where the method began; filled in at its first step.
        request: batch row to entry of a per-request budget.
        features: (G, V, D) of a group.
        signals: declared signals of a group.
        unasked: members that are left alone.

    Returns:
        (group before, group after, reduction) for each part with equal counts; `None` where
        nothing is removed.
    """
    alive = group.index.shape[1]
    for image in group.images:
        begin.setdefault((planned.method_number, image), alive)
    if not alive:
        return [(group, group, None)]

    def show(part: Group, quota: int) -> VisualTokens:
        return _shown(planned, part, quota, features, signals)

    asked = [i for i in range(len(group.images)) if i not in unasked]
    result = [_settled(planned, group.pick(sorted(unasked)), None)] if unasked else []
    if asked:
        decisions = _decisions(planned, group.pick(asked), begin, request, show)
        result += [_settled(planned, part, reduction) for part, reduction in decisions]
    return result


def _shown(
    planned: PlannedStep,
    group: Group,
    quota: int,
    features: Callable[[Group], Tensor],
    signals: Callable[[Group], Mapping[str, Tensor]],
) -> VisualTokens:
    """What a method sees of a group."""
    return VisualTokens(
        features=lambda: features(group),
        index=group.index,
        grid=group.shape.grid,
        rows=group.rows,
        signals=signals(group),
        number=planned.number,
        quota=quota,
        site=planned.step.site,
        frames=group.shape.frames,
        label=group.labels.get(planned.method_number),
        learned=planned.learned,
    )


def _decisions(
    planned: PlannedStep,
    group: Group,
    begin: Mapping[tuple[int, int], int],
    request: Callable[[int], int],
    show: Callable[[Group, int], VisualTokens],
) -> Iterator[tuple[Group, Reduction | None]]:
    """What a method makes of each part of a group; `None` where all tokens stay, unseen."""
    method, alive = planned.method, group.index.shape[1]
    for wanted, members in split_by_count(planned, group, begin, request).items():
        part = group.pick(members)
        if isinstance(method, Adaptive):
            for chosen, reduction in method.reduce_each(show(part, wanted)):
                yield from spared(part.pick(chosen), reduction)
        elif wanted == alive:
            yield part, None
        elif wanted == 0:
            yield from spared(part, Reduction(part.index[:, :0]))
        else:

            def reduce(count: int, part: Group = part) -> Reduction:
                return method.reduce(show(part, count), count)

            yield part, reduce_around(reduce, wanted, part.lasting, alive)


def _settled(
    planned: PlannedStep, group: Group, reduction: Reduction | None
) -> tuple[Group, Group, Reduction | None]:
    """A group before and after a decision, in raster order if positions stay."""
    if reduction is None:
        return group, group, None
    alive = group.index.shape[1]
    if reduction.ordered and not planned.renumber:
        reduction = reduction.in_raster_order(alive)
    after = group.reduced(reduction, planned.method_number)
    whole = reduction.kept == alive and not (reduction.merges or reduction.ordered)
    return group, after, None if whole else reduction
