"""One step on a group of images: how many tokens survive, and what the method makes of them.

Shapes: `G` images of a group, `V` tokens of each, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor

from foveate.core import Adaptive, Learning, Reduction, TrainingPass, VisualTokens
from foveate.engine.images import ImageGroup
from foveate.engine.plan import PlannedStep
from foveate.engine.readout import reduce_around, spared


def apply_step(
    planned: PlannedStep,
    group: ImageGroup,
    features: Callable[[ImageGroup], Tensor],
    signals: Callable[[ImageGroup], Mapping[str, Tensor]],
    unasked: Collection[int] = (),
    training: TrainingPass | None = None,
) -> list[tuple[ImageGroup, ImageGroup, Reduction | None]]:
    """Let a method reduce a group at one step.

    Args:
        planned: the step.
        group: the images.
        features: (G, V, D) of a group.
        signals: declared signals of a group.
        unasked: members that the step does not touch.
        training: the forward, in training.

    Returns:
        (group before, group after, reduction) for each part with equal counts; `None` where
        nothing is removed.
    """
    if not planned.sees(group.audio):
        return [(group, group, None)]
    if not group.count:
        group = group.begun(planned.method_number)
        return [_settled(planned, group, None)]
    counts = group.by_count(planned)
    group = group.begun(planned.method_number)

    def show(part: ImageGroup, quota: int) -> VisualTokens:
        return part.visual_tokens(planned, lambda: features(part), signals(part), quota=quota)

    result = [_settled(planned, group.pick(sorted(unasked)), None)] if unasked else []
    for count, members in counts.items():
        asked = [i for i in members if i not in unasked]
        if asked:
            decisions = _decisions(planned, group.pick(asked), count, show, training)
            result += [_settled(planned, part, reduction) for part, reduction in decisions]
    return result


def _decisions(
    planned: PlannedStep,
    group: ImageGroup,
    count: int,
    show: Callable[[ImageGroup, int], VisualTokens],
    training: TrainingPass | None,
) -> Iterator[tuple[ImageGroup, Reduction | None]]:
    """What a method makes of images of which equally many tokens survive; `None` where all do,
    which the method is not shown.
    """
    method = planned.method
    if training is not None and isinstance(method, Learning):
        yield group, method.reduce_softly(show(group, count), count, training)
    elif isinstance(method, Adaptive):
        for members, reduction in method.reduce_each(show(group, count)):
            yield from spared(group.pick(members), reduction)
    elif count == group.count:
        yield group, None
    elif count == 0:
        yield from spared(group, Reduction(group.index[:, :0]))
    else:

        def reduce(count: int) -> Reduction:
            return method.reduce(show(group, count), count)

        yield group, reduce_around(reduce, count, group.required)


def _settled(
    planned: PlannedStep, group: ImageGroup, reduction: Reduction | None
) -> tuple[ImageGroup, ImageGroup, Reduction | None]:
    """A group before and after a decision, in raster order if positions stay."""
    if reduction is None:
        return group, group.noted(planned.entry), None
    if reduction.ordered and not planned.renumber:
        reduction = reduction.in_raster_order()
    after = group.reduced(reduction, planned.method_number).noted(planned.entry)
    changed = reduction.merges or reduction.ordered or reduction.gates is not None
    unchanged = reduction.kept == group.count and not changed
    return group, after, None if unchanged else reduction
