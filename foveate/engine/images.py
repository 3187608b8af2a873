"""Images of a forward: where their tokens are, and which of them are alive.

Images with equal counts are handled together, so that methods see plain batched tensors. A video
counts as one image.
Shapes: `G` images of a group, `V` tokens of each, `B` batch, `T` logical length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from foveate.core import Adaptive, Reduction, VisualTokens
from foveate.core.tokens import Shape
from foveate.engine.plan import PlannedStep
from foveate.engine.readout import reduce_around, spared
from foveate.errors import InputError
from foveate.record.tiles import Placed

Kept = Mapping[str, Tensor]
Place = Callable[[], Placed]


@dataclass(frozen=True, eq=False)
class Group:
    """Images of the same shape, and the same number of tokens alive.

    Args:
        images: number of each image within the forward, in order of appearance.
        rows: row of the batch of each image.
        index: (G, V) raster positions alive; ascending, unless a method orders its survivors.
        shape: tokens, grid and frames of each image before anything was removed.
        ends: for each image, logical position of its last token, alive or not.
        columns: (G, V) logical position in its row of each living token, ascending; `None` while
            only features are known.
        before: for each image, entry of each step before the language model -> (K) raster positions
            alive after it.
        places: for each image, how to find out where in it the tokens lie.
        ordered: whether `index` need not ascend.
        began: for each image, number of a method -> tokens it had where the method began.
        labels: number of a method -> (G, V) what it has labelled each living token with.
        readout: for each image, whether a next token is read from its last token, which stays.
    """

    images: tuple[int, ...]
    rows: tuple[int, ...]
    index: Tensor
    shape: Shape
    ends: tuple[int, ...] = ()
    columns: Tensor | None = None
    before: tuple[Kept, ...] = ()
    places: tuple[Place | None, ...] = ()
    ordered: bool = False
    began: tuple[Mapping[int, int], ...] = ()
    labels: Mapping[int, Tensor] = field(default_factory=dict)
    readout: tuple[bool, ...] = ()

    @property
    def lasting(self) -> Tensor | None:
        """(G) which of the tokens alive may not be removed, -1 for none; `None` for no image."""
        if not any(self.readout):
            return None
        read = torch.tensor(self.readout, device=self.index.device)
        there = (self.index[:, -1:] == self.shape.total - 1).any(1)
        return torch.where(read & there, self.index.shape[1] - 1, -1)

    def pick(self, members: Sequence[int]) -> Group:
        """The group of some of its images."""
        if len(members) == len(self.images):
            return self
        chosen = torch.tensor(members, device=self.index.device)
        return replace(
            self,
            images=tuple(self.images[i] for i in members),
            rows=tuple(self.rows[i] for i in members),
            index=self.index[chosen],
            ends=tuple(self.ends[i] for i in members) if self.ends else (),
            columns=None if self.columns is None else self.columns[chosen],
            before=tuple(self.before[i] for i in members) if self.before else (),
            places=tuple(self.places[i] for i in members) if self.places else (),
            began=tuple(self.began[i] for i in members) if self.began else (),
            labels={method: label[chosen] for method, label in self.labels.items()},
            readout=tuple(self.readout[i] for i in members) if self.readout else (),
        )

    def reduced(self, reduction: Reduction, method: int) -> Group:
        """The group after a reduction by the method of a number."""
        labels = {n: label.gather(1, reduction.index) for n, label in self.labels.items()}
        if reduction.label is not None:
            labels[method] = reduction.label
        columns = None if self.columns is None else self.columns.gather(1, reduction.index)
        if columns is not None and reduction.ordered:
            columns = columns.sort(dim=1).values
        return replace(
            self,
            index=self.index.gather(1, reduction.index),
            columns=columns,
            ordered=self.ordered or reduction.ordered,
            labels=labels,
        )


@dataclass(frozen=True, eq=False)
class Left:
    """What the steps before the language model have left of an image.

    Args:
        count: tokens alive.
        began: number of a method -> tokens it had where the method began.
        labels: number of a method -> (K) its labels, in the order of columns.
        index: (K) raster positions alive in the order of their columns; `None` for raster order.
        kept: entry of each step behind the encoder -> (K) raster positions alive after it.
    """

    count: int
    began: Mapping[int, int]
    labels: Mapping[int, Tensor]
    index: Tensor | None = None
    kept: Kept = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Part:
    """Images of one modality in a forward.

    Args:
        visual: (B, T) their placeholders.
        shapes: tokens, grid and frames of each image, in order of appearance.
        dead: (N) for each placeholder in row-major order, whether its token was removed before the
            text model.
        before: for each image, place inside the encoder -> (K) raster positions alive behind it.
        places: for each image, how to find out where in it the tokens lie.
        left: for each image, what the steps before the language model have left of it; empty where
            it is not known.
    """

    visual: Tensor
    shapes: Sequence[Shape]
    dead: Tensor | None = None
    before: Sequence[Kept] = ()
    places: Sequence[Place | None] = ()
    left: Sequence[Left] = ()


@dataclass(frozen=True, eq=False)
class _Span:
    row: int
    columns: Tensor
    index: Tensor
    shape: Shape
    before: Kept
    place: Place | None
    began: Mapping[int, int]
    labels: Mapping[int, Tensor]


def group_features(
    shapes: Sequence[Shape],
    rows: Sequence[int],
    ends: Sequence[int],
    device: torch.device,
    alive: Sequence[Tensor] | None = None,
    readout: Sequence[bool] = (),
) -> list[Group]:
    """Group images by shape, before their place in the sequence is known.

    Args:
        shapes: tokens, grid and frames of each image.
        rows: row of the batch of each image.
        ends: logical position of each image's last token; empty where it is not known.
        device: where the features live.
        alive: (K) raster positions that the encoder has left of each image; `None` for all.
        readout: for each image, whether a next token is read from it; empty where none is.
    """
    alike: dict[tuple[Shape, int], list[int]] = defaultdict(list)
    for image, shape in enumerate(shapes):
        left = shape.total if alive is None else len(alive[image])
        alike[shape, left].append(image)
    return [
        Group(
            tuple(images),
            tuple(rows[i] for i in images),
            torch.arange(shape.total, device=device).expand(len(images), shape.total)
            if alive is None
            else torch.stack([alive[i] for i in images]).to(device),
            shape,
            tuple(ends[i] for i in images) if ends else (),
            readout=tuple(readout[i] for i in images) if readout else (),
        )
        for (shape, _), images in alike.items()
    ]


def locate(parts: Sequence[Part], readout: Tensor | None = None) -> list[Group]:
    """Find the images of a forward, and what is alive of them; they are numbered in order of
    appearance.

    Args:
        parts: the images of each modality.
        readout: (B, T) visual tokens that a next token is read from; `None` if there are none.

    Raises:
        InputError: placeholders and features disagree, or an image spans two rows.
    """
    spans = sorted(
        (span for part in parts for span in _spans(part)),
        key=lambda span: (span.row, int(span.columns[0])),
    )
    alike: dict[tuple[Shape, int, frozenset[int]], list[int]] = defaultdict(list)
    for image, span in enumerate(spans):
        alike[span.shape, len(span.index), frozenset(span.labels)].append(image)
    device = parts[0].visual.device if parts else None
    return [
        Group(
            tuple(images),
            tuple(spans[i].row for i in images),
            torch.stack([spans[i].index for i in images]).to(device),
            shape,
            tuple(int(spans[i].columns[-1]) for i in images),
            torch.stack([spans[i].columns[spans[i].index.sort().values] for i in images]).to(
                device
            ),
            tuple(spans[i].before for i in images),
            tuple(spans[i].place for i in images),
            any(left.index is not None for part in parts for left in part.left),
            tuple(spans[i].began for i in images),
            {n: torch.stack([spans[i].labels[n] for i in images]).to(device) for n in numbers},
            ()
            if readout is None
            else tuple(bool(readout[spans[i].row, spans[i].columns[-1]]) for i in images),
        )
        for (shape, _, numbers), images in alike.items()
    ]


def _spans(part: Part) -> list[_Span]:
    where = part.visual.nonzero().cpu()
    tokens = sum(shape.total for shape in part.shapes)
    if where.shape[0] != tokens:
        raise InputError(
            f"the prompt has {where.shape[0]} image placeholders, but the images have "
            f"{tokens} visual tokens"
        )
    alive = torch.ones(where.shape[0], dtype=torch.bool) if part.dead is None else ~part.dead.cpu()
    spans = []
    start = 0
    before = part.before or [{}] * len(part.shapes)
    places = part.places or [None] * len(part.shapes)
    lefts: Sequence[Left | None] = part.left or [None] * len(part.shapes)
    images = zip(part.shapes, before, places, lefts, strict=True)
    for shape, kept, place, left in images:
        stop = start + shape.total
        at, living = where[start:stop], alive[start:stop]
        start = stop
        if not shape.total:
            continue
        row = int(at[0, 0])
        if row != int(at[-1, 0]):
            raise InputError(
                f"an image has {shape.total} visual tokens, but its placeholders lie in two rows"
            )
        index = living.nonzero()[:, 0]
        if left is not None and len(index) != left.count:
            raise InputError(
                f"{left.count - len(index)} visual tokens of an image of {shape.total} hold NaN, "
                "which marks removed tokens: look for a NaN in the pixels, in the encoder (an "
                "overflow in float16?), or in what a method makes of merged tokens"
            )
        if left is None:
            left = Left(len(index), {}, {})
        elif left.index is not None:
            index = left.index.cpu()
        kept = {**kept, **left.kept}
        spans.append(_Span(row, at[:, 1], index, shape, kept, place, left.began, left.labels))
    return spans


def note(group: Group, entry: str, kept: Mapping[int, dict[str, Tensor]]) -> None:
    """Write down in `kept`, of each image, which tokens are alive after a step."""
    for i, image in enumerate(group.images):
        index = group.index[i]
        kept[image][entry] = index.sort().values if group.ordered else index


def rows_of(visual: Tensor, shapes: Sequence[Shape]) -> tuple[list[int], list[int]]:
    """The row of the batch of each image, and the logical position of its last token.

    Args:
        visual: (B, T) placeholders.
        shapes: tokens, grid and frames of each image, in order of appearance.
    """
    spans = _spans(Part(visual, shapes))
    return [span.row for span in spans], [int(span.columns[-1]) for span in spans]


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
            for chosen, reduction in method.split(show(part, wanted)):
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
