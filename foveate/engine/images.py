"""Images of a forward as values: which of their tokens survive, and where these are.

Images of the same shape with equally many surviving tokens form a group, so that methods see plain
batched tensors. All stages use the same group: the encoder, the image features and the language
model. A video counts as one image, and so does a clip of audio.
Shapes: `G` images of a group, `V` surviving tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.core import Reduction, VisualTokens
from foveate.core.tokens import Shape
from foveate.core.transfer import upload
from foveate.engine.plan import PlannedStep
from foveate.record.tiles import TokenBoxes

Kept = Mapping[str, Tensor]
Locate = Callable[[], TokenBoxes]


@dataclass(frozen=True, eq=False)
class Image:
    """An image of a forward, or of a pass through an encoder.

    Args:
        number: which one it is, in order of appearance.
        row: row of the batch.
        request: its entry of a per-request budget.
        end: logical position of its last token, dropped or not; -1 while the prompt is not known.
        required: raster position of a token that may not be removed; -1 if it has none.
        kept: entry of each step -> (K) raster positions that survive it, ascending.
        locate: finds out where in the image the tokens lie.
        tokens_at_start: number of a method -> tokens it had where the method began.
        most: tokens that may survive the last step before the language model; `None` for as many as
            the method leaves.
        order: (V) its survivors of the steps before the language model, those to keep longest
            first, where a conversation has a total; else `None`.
        audio: whether it is a clip of audio.
    """

    number: int
    row: int
    request: int = 0
    end: int = -1
    required: int = -1
    kept: Kept = field(default_factory=dict)
    locate: Locate | None = None
    tokens_at_start: Mapping[int, int] = field(default_factory=dict)
    most: int | None = None
    order: Tensor | None = None
    audio: bool = False


@dataclass(frozen=True, eq=False)
class ImageGroup:
    """Images of the same shape with equally many surviving tokens.

    Args:
        images: the images.
        index: (G, V) surviving raster positions; ascending unless `ordered`.
        shape: tokens, grid and frames of each image before anything was removed.
        columns: (G, V) logical position in its row of each surviving token, ascending; `None`
            before the language model.
        ordered: whether `index` need not ascend: a method orders its survivors, or the tokens are
            inside an encoder.
        labels: number of a method -> (G, V) its label of each surviving token.
        merged: inside an encoder, (G, V) how many tokens each stands for; `None` before any merge.
        valid: inside an encoder, (G, V) mask of real survivors; the rest is padding. `None` where
            all are real.
    """

    images: tuple[Image, ...]
    index: Tensor
    shape: Shape
    columns: Tensor | None = None
    ordered: bool = False
    labels: Mapping[int, Tensor] = field(default_factory=dict)
    merged: Tensor | None = None
    valid: Tensor | None = None
    _by_count: dict[tuple[int, int], dict[int, list[int]]] = field(default_factory=dict, init=False)

    @cached_property
    def count(self) -> int:
        """Surviving tokens of each image, V."""
        return self.index.shape[1]

    @cached_property
    def dropped(self) -> int:
        """Tokens that each image has lost."""
        return self.shape.total - self.count

    @cached_property
    def audio(self) -> bool:
        """Whether its images are clips of audio."""
        return bool(self.images) and self.images[0].audio

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """Number of each image."""
        return tuple(image.number for image in self.images)

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Row of the batch of each image."""
        return tuple(image.row for image in self.images)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Logical position of the last token of each image."""
        return tuple(image.end for image in self.images)

    @cached_property
    def required(self) -> Tensor | None:
        """(G) which surviving token may not be removed, -1 for none; `None` if no image has one."""
        if all(image.required < 0 for image in self.images):
            return None
        required = upload([image.required for image in self.images], self.index.device)
        numbers = torch.arange(1, self.count + 1, device=self.index.device)
        return ((self.index == required[:, None]) * numbers).sum(1) - 1

    def by_count(self, planned: PlannedStep) -> Mapping[int, list[int]]:
        """Tokens that survive a step -> the members of which so many do; worked out once."""
        key = planned.method_number, planned.number
        if key not in self._by_count:
            counts: dict[int, list[int]] = {}
            for member, image in enumerate(self.images):
                start = image.tokens_at_start.get(planned.method_number, self.count)
                count = planned.count(self.count, start, image.request)
                count = count if image.most is None else min(count, image.most)
                counts.setdefault(count, []).append(member)
            self._by_count[key] = counts
        return self._by_count[key]

    def visual_tokens(
        self,
        planned: PlannedStep,
        features: Callable[[], Tensor],
        signals: Mapping[str, Tensor] | None = None,
        *,
        quota: int = 0,
        special: int = 0,
        memory: MutableMapping[str, Any] | None = None,
    ) -> VisualTokens:
        """What a method is shown of the group.

        Args:
            planned: the step.
            features: returns (G, V, D) values of the tokens.
            signals: what the step declared in `needs`.
            quota: tokens of each image that the method's `count` grants it.
            special: inside an encoder, rows before the patches.
            memory: inside an encoder, what the method has noted of the group in this pass.
        """
        return VisualTokens(
            features=features,
            index=self.index,
            grid=self.shape.grid,
            rows=self.rows,
            signals={} if signals is None else signals,
            merged=self.merged,
            special=special,
            site=planned.step.site,
            step=planned.step,
            frames=self.shape.frames,
            number=planned.number,
            quota=quota,
            label=self.labels.get(planned.method_number),
            valid=self.valid,
            learned=planned.learned,
            memory={} if memory is None else memory,
            total=self.shape.total,
        )

    def pick(self, members: Sequence[int]) -> ImageGroup:
        """The group of some of its images."""
        if len(members) == len(self.images):
            return self
        chosen = upload(members, self.index.device)
        return replace(
            self,
            images=tuple(self.images[i] for i in members),
            index=self.index[chosen],
            columns=None if self.columns is None else self.columns[chosen],
            labels={method: label[chosen] for method, label in self.labels.items()},
            merged=None if self.merged is None else self.merged[chosen],
            valid=None if self.valid is None else self.valid[chosen],
        )

    def begun(self, method: int) -> ImageGroup:
        """The group once the method of a number has begun."""
        if all(method in image.tokens_at_start for image in self.images):
            return self
        images = (
            replace(image, tokens_at_start={method: self.count, **image.tokens_at_start})
            for image in self.images
        )
        return replace(self, images=tuple(images))

    def reduced(self, reduction: Reduction, method: int) -> ImageGroup:
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
            valid=reduction.valid,
        )

    def with_kept(self, kept: Mapping[int, Kept]) -> ImageGroup:
        """The group whose images have noted something else, by number of the image."""
        images = (replace(image, kept=kept[image.number]) for image in self.images)
        return replace(self, images=tuple(images))

    def noted(self, entry: str) -> ImageGroup:
        """The group after a step, whose survivors each image notes if the step has a name."""
        if not entry:
            return self
        index = self.index.sort().values if self.ordered and self.valid is None else self.index
        rows: Sequence[Tensor] = index.unbind()
        if self.valid is not None:
            padding = torch.iinfo(index.dtype).max
            ascending = index.masked_fill(~self.valid, padding).sort().values
            counts = self.valid.sum(1).tolist()
            rows = [row[:count] for row, count in zip(ascending, counts, strict=True)]
        images = (
            replace(image, kept={**image.kept, entry: row})
            for image, row in zip(self.images, rows, strict=True)
        )
        return replace(self, images=tuple(images))


@dataclass(frozen=True, eq=False)
class ImageState:
    """What the steps before the language model have made of an image.

    Args:
        count: surviving tokens.
        tokens_at_start: number of a method -> tokens it had where the method began.
        labels: number of a method -> (K) its labels, in the order of columns.
        index: (K) surviving raster positions in the order of their columns; `None` for raster
            order.
        kept: entry of each step on features -> (K) raster positions that survive it.
        order: as in `Image`.
    """

    count: int
    tokens_at_start: Mapping[int, int]
    labels: Mapping[int, Tensor]
    index: Tensor | None = None
    kept: Kept = field(default_factory=dict)
    order: Tensor | None = None


def group_images(
    images: Sequence[Image],
    shapes: Sequence[Shape],
    device: torch.device,
    index: Sequence[Tensor] | None = None,
    columns: Sequence[Tensor] | None = None,
    labels: Sequence[Mapping[int, Tensor]] | None = None,
    *,
    ordered: bool = False,
) -> list[ImageGroup]:
    """Group images of the same shape with equally many surviving tokens, and the same labels;
    clips of audio apart.

    Args:
        images: the images.
        shapes: tokens, grid and frames of each.
        device: where the groups live.
        index: (V) surviving raster positions of each; `None` for all.
        columns: (V) logical positions of these.
        labels: number of a method -> (V) labels of these.
        ordered: whether `index` need not ascend.
    """
    alike: dict[tuple[Shape, int, frozenset[int], bool], list[int]] = {}
    for i, shape in enumerate(shapes):
        count = shape.total if index is None else len(index[i])
        methods = frozenset(() if labels is None else labels[i])
        alike.setdefault((shape, count, methods, images[i].audio), []).append(i)

    def stack(rows: Sequence[Tensor], members: Sequence[int]) -> Tensor:
        return upload(
            torch.stack([upload(rows[i], rows[members[0]].device) for i in members]), device
        )

    return [
        ImageGroup(
            tuple(images[i] for i in members),
            torch.arange(shape.total, device=device).expand(len(members), shape.total)
            if index is None
            else stack(index, members),
            shape,
            None if columns is None else stack(columns, members),
            ordered,
            {}
            if labels is None
            else {n: torch.stack([labels[i][n] for i in members]).to(device) for n in methods},
        )
        for (shape, _, methods, _), members in alike.items()
    ]
