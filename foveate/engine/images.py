"""Images of a forward: where their tokens are, and which of them are alive.

Images with equal counts are handled together, so that methods see plain batched tensors.
Shapes: `G` images of a group, `V` tokens of each, `B` batch, `T` logical length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.engine.plan import PlannedStep
from foveate.errors import InputError
from foveate.models import Family
from foveate.reduction import Reduction
from foveate.tokens import VisualTokens


@dataclass(frozen=True, eq=False)
class Group:
    """Images with the same number of tokens before, and the same number alive.

    Args:
        images: number of each image within the forward.
        rows: row of the batch of each image.
        index: (G, V) raster positions alive, ascending.
        total: tokens of each image before anything was removed.
        columns: (G, V) logical position of each living token in its row; `None` while only
            features are known.
    """

    images: tuple[int, ...]
    rows: tuple[int, ...]
    index: Tensor
    total: int
    columns: Tensor | None = None

    def pick(self, members: Sequence[int]) -> Group:
        """The group of some of its images."""
        if len(members) == len(self.images):
            return self
        chosen = torch.tensor(members, device=self.index.device)
        return Group(
            tuple(self.images[i] for i in members),
            tuple(self.rows[i] for i in members),
            self.index[chosen],
            self.total,
            None if self.columns is None else self.columns[chosen],
        )

    def reduced(self, reduction: Reduction) -> Group:
        """The group after a reduction."""
        columns = None if self.columns is None else self.columns.gather(1, reduction.index)
        index = self.index.gather(1, reduction.index)
        return Group(self.images, self.rows, index, self.total, columns)


def group_features(
    features: Sequence[Tensor], rows: Sequence[int], alive: Sequence[Tensor] | None = None
) -> list[Group]:
    """Group images by the number of their features, and by how many of them are alive.

    Args:
        features: (V, D) of each image.
        rows: row of the batch of each image.
        alive: (K) raster positions that the encoder has left of each image; `None` for all.
    """
    by_count: dict[tuple[int, int], list[int]] = defaultdict(list)
    for image, feature in enumerate(features):
        count = feature.shape[0]
        by_count[count, count if alive is None else len(alive[image])].append(image)
    return [
        Group(
            tuple(images),
            tuple(rows[i] for i in images),
            torch.arange(total, device=features[images[0]].device).expand(len(images), total)
            if alive is None
            else torch.stack([alive[i] for i in images]),
            total,
        )
        for (total, _), images in by_count.items()
    ]


def locate(visual: Tensor, lengths: Sequence[int], dead: Tensor | None = None) -> list[Group]:
    """Find the images of a forward, and what is alive of them.

    Args:
        visual: (B, T) placeholders.
        lengths: tokens of each image, in order of appearance.
        dead: (N) for each placeholder in row-major order, whether its token was removed before the
            text model.

    Raises:
        InputError: placeholders and features disagree, or an image spans two rows.
    """
    where = visual.nonzero().cpu()
    if where.shape[0] != sum(lengths):
        raise InputError(
            f"the prompt has {where.shape[0]} image placeholders, but the images have "
            f"{sum(lengths)} visual tokens"
        )
    alive = torch.ones(where.shape[0], dtype=torch.bool) if dead is None else ~dead.cpu()
    grouped: dict[tuple[int, int], list[tuple[int, int, Tensor, Tensor]]] = defaultdict(list)
    start = 0
    for image, length in enumerate(lengths):
        span = where[start : start + length]
        if length and int(span[0, 0]) != int(span[-1, 0]):
            raise InputError(
                f"image {image} has {length} visual tokens, but its placeholders lie in two rows"
            )
        index = alive[start : start + length].nonzero()[:, 0]
        grouped[length, len(index)].append((image, int(span[0, 0]), index, span[index, 1]))
        start += length
    return [
        Group(
            tuple(member[0] for member in members),
            tuple(member[1] for member in members),
            torch.stack([member[2] for member in members]).to(visual.device),
            total,
            torch.stack([member[3] for member in members]).to(visual.device),
        )
        for (total, _), members in grouped.items()
    ]


def rows_of(visual: Tensor, lengths: Sequence[int]) -> list[int]:
    """The row of the batch of each image."""
    rows = {
        i: row
        for group in locate(visual, lengths)
        for i, row in zip(group.images, group.rows, strict=True)
    }
    return [rows[i] for i in range(len(lengths))]


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
    family: Family,
    group: Group,
    begin: dict[tuple[int, int], int],
    request: Callable[[int], int],
    features: Callable[[Group], Tensor],
    signals: Callable[[Group], Mapping[str, Tensor]],
) -> list[tuple[Group, Group, Reduction | None]]:
    """Let a method reduce a group at one step.

    Args:
        planned: the step.
        family: for the grid of an image.
        group: images alive.
        begin: tokens of (method, image) where the method began; filled in at its first step.
        request: batch row to entry of a per-request budget.
        features: (G, V, D) of a group.
        signals: declared signals of a group.

    Returns:
        (group before, group after, reduction) for each part with equal counts; `None` where
        nothing is removed.
    """
    alive = group.index.shape[1]
    for image in group.images:
        begin.setdefault((planned.method_number, image), alive)
    parts = split_by_count(planned, group, begin, request)
    result: list[tuple[Group, Group, Reduction | None]] = []
    for wanted, members in parts.items():
        part = group.pick(members)
        if wanted == alive:
            result.append((part, part, None))
            continue
        tokens = VisualTokens(
            features=lambda part=part: features(part),  # type: ignore[misc]
            index=part.index,
            grid=family.grid(part.total),
            rows=part.rows,
            signals=signals(part),
        )
        reduction = planned.method.reduce(tokens, wanted)
        result.append((part, part.reduced(reduction), reduction))
    return result
