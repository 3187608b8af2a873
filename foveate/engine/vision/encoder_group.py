"""EncoderGroup: images of one pass through an encoder that have the same grid, and their rows.

Shapes: `G` images, `V` visual tokens of each, `K` of them surviving, `R` rows of the encoder that a
token has, `D` width of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from foveate.core import Reduction, by_count
from foveate.core.ranking import marked
from foveate.core.tokens import Shape
from foveate.core.transfer import members_of, upload
from foveate.engine.images import Image, ImageGroup, group_images
from foveate.engine.plan import PlannedStep
from foveate.engine.vision.exits import Exits
from foveate.errors import InputError
from foveate.families import Encoder, Family
from foveate.families.rows import EncoderImage, raster_rows, token_grid


@dataclass(eq=False)
class EncoderGroup:
    """A group of images inside the encoder, and the rows that hold their tokens.

    A token's rows stay together: what happens to the token happens to the first row of every token,
    to the second, and so on.

    Args:
        images: the group.
        rows: (G, V, R) rows of each token, among all rows of the pass.
        layout: from all tokens to those that survive; `None` while all do.
        visible: (G, V, R) 1 for rows that others attend to, 0 for padding; `None` for all.
        exits: what brings tokens back that have left early; `None` if none can.
    """

    images: ImageGroup
    rows: Tensor
    layout: Reduction | None = None
    visible: Tensor | None = None
    exits: Exits | None = None

    @property
    def total(self) -> int:
        """Tokens of each image, V."""
        return self.rows.shape[1]

    def survivors_of(self, planned: PlannedStep) -> int:
        """Tokens of each image that survive a step; equally many, as their budget is one."""
        (count,) = self.images.by_count(planned)
        return count

    def by_survivors(
        self, x: Tensor, reduction: Reduction
    ) -> Iterator[tuple[EncoderGroup, Tensor, Reduction]]:
        """Parts of the group of which equally many tokens survive, their values, and what of the
        reduction is theirs, without padding.

        Args:
            x: (G, V, R D) values of the group, of which nothing has been removed.
            reduction: a gather.
        """
        assert self.layout is None
        assert not reduction.merges
        valid = reduction.valid
        assert valid is not None  # or there is nothing to take apart
        counts = by_count(valid.sum(1))
        for count, members in counts.items():
            of = self if len(counts) == 1 else self._pick(members)
            there = marked(members_of(valid, members), count)
            index = members_of(reduction.index, members).gather(1, there)
            yield of, members_of(x, members), Reduction(index)

    def _pick(self, members: Sequence[int]) -> EncoderGroup:
        """The group of some of its images, of which nothing has been removed."""
        visible = None if self.visible is None else members_of(self.visible, members)
        rows = members_of(self.rows, members)
        return EncoderGroup(self.images.pick(members), rows, visible=visible)

    def reduce(self, reduction: Reduction, planned: PlannedStep) -> None:
        """Reduce the surviving tokens, as a step wants."""
        layout, reduction = self.layout, replace(reduction, values=None)
        self.layout = reduction if layout is None else layout.then(reduction, self.total)
        merges = self.images.merged is not None or reduction.merges
        merged = self.layout.sizes(self.total) if merges else None
        images = self.images.begun(planned.method_number)
        images = images.reduced(reduction, planned.method_number)
        self.images = replace(images, merged=merged)

    def keeps_all(self, reduction: Reduction) -> bool:
        """Whether a reduction of the surviving tokens leaves all of them, as they are."""
        before, after = (
            index.numel() if valid is None else int(valid.sum())
            for index, valid in (
                (self.images.index, self.images.valid),
                (reduction.index, reduction.valid),
            )
        )
        return before == after and not reduction.merges

    def note(self, planned: PlannedStep) -> None:
        """Note what survives a step, unless it only looks."""
        self.images = self.images.begun(planned.method_number)
        if planned.entry:
            self.images = self.images.noted(planned.entry)

    def rows_at(self, layout: Reduction | None) -> Tensor:
        """(G, K, R) rows of the tokens that a layout leaves."""
        if layout is None:
            return self.rows
        index = layout.index[..., None].expand(-1, -1, self.rows.shape[2])
        return self.rows.gather(1, index)

    def counts(self, layout: Reduction | None, *, merged: bool) -> Tensor | None:
        """(G, K, R) how many rows that others attend to each row stands for; `None` if all 1.

        Args:
            layout: the tokens that survive.
            merged: whether merged tokens count as often as they have sources, or once.
        """
        seen = self.visible
        if layout is None:
            return seen
        seen = None if seen is None else layout.apply(seen)
        if layout.valid is not None:
            valid = layout.valid.float()[..., None].expand(-1, -1, self.rows.shape[2])
            seen = valid if seen is None else seen * valid
        if not merged:
            return None if seen is None else seen.gt(0).to(seen)
        if self.images.merged is None:
            return seen
        sizes = layout.sizes(self.total)[..., None].expand(-1, -1, self.rows.shape[2])
        return sizes if seen is None else seen * sizes

    def recover(self, x: Tensor, layout: Reduction | None, missing: float | None = None) -> Tensor:
        """Back to all tokens.

        Args:
            x: (G, K, R D) values of the tokens that a layout leaves.
            layout: the layout.
            missing: what dropped tokens get; `None` gives them the mean of the surviving tokens of
                their image, so that a head which averages all rows sees that mean. Those that have
                left early get what the method says.
        """
        if layout is None:
            return x
        if missing is not None:
            return layout.recover(x, self.total, missing)
        if self.exits is not None:
            return self.exits.back(x, layout)
        counts = self.counts(layout, merged=True)
        if counts is None:
            counts = torch.ones(*x.shape[:2], 1, device=x.device)
        share = counts.to(x.dtype)[..., None]
        rows = x.unflatten(-1, (self.rows.shape[2], -1))
        mean = (rows * share).sum(1, keepdim=True) / share.sum(1, keepdim=True).clamp(min=1)
        return layout.recover(x, self.total, mean.expand(-1, -1, *rows.shape[2:]).flatten(2))


def images_of(
    family: Family,
    encoder: Encoder,
    arguments: Mapping[str, Any],
    side: int,
    images: int,
    length: int,
) -> list[EncoderImage]:
    """The images of a sequence, or of the rows of a batch.

    Args:
        family: for the grid of an image.
        encoder: the encoder.
        arguments: what its tower was called with.
        side: side of a visual token in patches.
        images: rows of the batch.
        length: rows of each image.

    Raises:
        InputError: some patches are hidden from the encoder.
    """
    if encoder.packed is not None:
        return encoder.packed(arguments, side)
    frames, height, width = patches_of(family, encoder, arguments, length - encoder.special)
    rows = encoder.leading + raster_rows(frames * height, width, side)
    grid = token_grid(height, width, side)
    return [EncoderImage(grid, rows + n * length, frames) for n in range(images)]


def patches_of(
    family: Family, encoder: Encoder, arguments: Mapping[str, Any], count: int
) -> tuple[int, int, int]:
    """(frames, height, width) of an image's patches, or a video's.

    Args:
        family: for the grid of an image.
        encoder: the encoder.
        arguments: what it was called with.
        count: how many patches it sees.

    Raises:
        InputError: some of them are hidden from the encoder.
    """
    if encoder.patches is None:
        pixels = arguments.get("pixel_values")
        return 1, *patch_grid(family, encoder.tower.config, pixels, count)
    sizes = encoder.patches(arguments)
    if math.prod(sizes) != count:
        raise InputError(
            f"the encoder sees {count} of {math.prod(sizes)} patches of each video, as a mask "
            "hides the others, and which these are methods cannot know; leave the mask out, or do "
            "without methods"
        )
    return sizes


def patch_grid(family: Family, config: Any, pixels: Tensor | None, count: int) -> tuple[int, int]:
    """(height, width) of an image's patches.

    Args:
        family: the model.
        config: of its encoder.
        pixels: what the encoder is fed.
        count: the patches.
    """
    patch = getattr(config, "patch_size", None)
    if pixels is not None and pixels.dim() == 4:
        sides = (patch, patch) if isinstance(patch, int) else tuple(patch or (1, 1))
        height, width = (n // side for n, side in zip(pixels.shape[-2:], sides, strict=True))
        if height * width == count:
            return height, width
    return family.grid(count)


def encoder_groups(
    encoder_images: Sequence[EncoderImage], device: torch.device, required: Tensor | None = None
) -> list[EncoderGroup]:
    """Group the images of a pass that have the same grid, and tokens of equally many rows.

    Args:
        encoder_images: the images, as the encoder sees them.
        device: where the states live.
        required: numbers, among the tokens of all images, of those that may not be removed.
    """
    shapes = [Shape(len(image.rows), image.grid, image.frames) for image in encoder_images]
    starts = [0, *accumulate(shape.total for shape in shapes)]
    tokens = [] if required is None else required.tolist()
    images = [
        Image(
            number,
            row=number,
            required=next((n - start for n in tokens if start <= n < start + shape.total), -1),
        )
        for number, (start, shape) in enumerate(zip(starts, shapes, strict=False))
    ]
    alike: dict[int, list[int]] = {}
    for number, of in enumerate(encoder_images):
        alike.setdefault(of.rows.shape[1], []).append(number)
    return [
        EncoderGroup(
            replace(group, ordered=True),  # what happens inside an encoder need not keep order
            upload(torch.stack([encoder_images[n].rows for n in group.numbers]), device),
        )
        for members in alike.values()
        for group in group_images(
            [images[n] for n in members], [shapes[n] for n in members], device
        )
    ]


def mean_of_rows(x: Tensor, of: EncoderGroup) -> Tensor:
    """(G, K, D) mean of each token's rows, from (G, K, R D)."""
    cell = of.rows.shape[2]
    return x if cell == 1 else x.unflatten(2, (cell, -1)).mean(2)
