"""BiFormer: let the patches of each region attend to the few regions that suit it best.

Paper: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv:2303.08810
(CVPR 2023). Reference code: rayleizhu/BiFormer @ 1697bbb; nothing of it is copied.
Differs from the reference: this is its attention within an encoder that was not trained for it, so
that queries, keys, values and the scale of scores are the encoder's own (there: scores are divided
by the root of the full width); there is no depth-wise convolution of values; special tokens attend
to all and are attended to by all (there: none); where the grid does not divide, the last regions
are smaller and nobody attends to what they lack (there: padding takes part); regions of all frames
of a video compete; keys of the chosen regions are copied for some regions at a time (there: for all
of them). `regions` is the release's n_win, `topk` its topk in one of its stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import Approximate, LayerAttention, LayerShape, Step, VisualTokens, register
from foveate.core.fields import Positive
from foveate.core.ranking import ranked
from foveate.core.transfer import upload


@register(
    "biformer",
    stage="vision",
    does="attends to matching regions only",
    paper="Zhu et al. 2023, arXiv:2303.08810",
)
@dataclass(frozen=True)
class BiFormer(Approximate):
    """Route each region to the `topk` regions whose mean key suits its mean query best.

    Its patches attend to all patches of those, and to special tokens. What is left out is lost: on
    an encoder that was not trained or fine-tuned with it, outputs change much. Published results
    are of models trained from scratch. Nothing is removed.

    Args:
        regions: regions along each side of the grid.
        topk: regions that each attends to.
        layers: encoder layers that are computed so; `None` for all that are read.
        keep: `None`: nothing is removed.
        positions: without effect, as nothing is removed.

    Cost: a product of all regions with each other, beside the attention that is left.
    """

    note = (
        "biformer leaves out attention that the encoder was trained with; train with it before "
        "relying on results"
    )
    regions: Positive = 7
    topk: Positive = 4

    def attend(self, tokens: VisualTokens, layer: LayerAttention) -> Tensor:
        """Block-sparse attention of patches; special rows attend to all."""
        shape = layer.shape
        index = blocks(shape, self.regions)
        if self.topk >= len(index):
            return layer.plain()
        mixed = attend_routed(layer, index, self.topk)
        if not shape.special:
            return mixed
        first = layer.query[:, :, : shape.special]
        return torch.cat((layer.kernel(first, layer.key, layer.value, None), mixed), 1)

    def attend_flops(self, step: Step, shape: LayerShape) -> int:
        """Affinities of regions, and the attention that is left, padding included."""
        count, size = blocks(shape, self.regions).shape
        if self.topk >= count:
            return super().attend_flops(step, shape)
        pairs = count * size * (self.topk * size + shape.special) + shape.special * shape.rows
        return 2 * shape.mixed * count**2 + 4 * shape.mixed * pairs


def blocks(shape: LayerShape, regions: int) -> Tensor:
    """(R, n) the patches of each region, frame by frame in raster order; -1 for what one lacks.

    Args:
        shape: what there is of an image.
        regions: along each side of the grid, at most.
    """
    sides = [math.ceil(side / regions) for side in shape.grid]
    counts = [math.ceil(side / size) for side, size in zip(shape.grid, sides, strict=True)]
    row, column = (
        torch.arange(count * size).view(count, size)
        for count, size in zip(counts, sides, strict=True)
    )
    height, width = shape.grid
    position = row[:, None, :, None] * width + column[None, :, None]
    outside = (row >= height)[:, None, :, None] | (column >= width)[None, :, None]
    position = position.masked_fill(outside, -1).view(counts[0] * counts[1], -1)
    start = torch.arange(shape.frames)[:, None, None] * (height * width)
    return torch.where(position < 0, -1, position + start).flatten(0, 1)


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """(B, R, n, H, d) of (B, H, P, d): every region is one run of memory."""
    return x.transpose(1, 2)[:, upload(index.clamp(min=0), x.device)]


def route(query: Tensor, key: Tensor, index: Tensor, topk: int) -> Tensor:
    """(B, R, k) the regions that suit each best, the best first: by the product of the mean of its
    queries with the mean of their keys, over all heads together.

    Args:
        query: (B, R, n, H, d) queries.
        key: (B, R, n, H', d) keys, of as many heads or of a divisor of them.
        index: (R, n) as `blocks` has it, on the host.
        topk: k.
    """
    query, key = (means(part.detach(), index) for part in (query, key))
    key = key.repeat_interleave(query.shape[2] // key.shape[2], 2)
    return ranked(query.flatten(2) @ key.flatten(2).transpose(1, 2))[..., :topk]


def means(x: Tensor, index: Tensor) -> Tensor:
    """(B, R, H, d) mean of what there is of each region, of (B, R, n, H, d)."""
    there = index >= 0
    if bool(there.all()):
        return x.mean(2)
    there = upload(there, x.device)
    return (x * there[..., None, None].to(x)).sum(2) / there.sum(1)[:, None, None]


def attend_routed(layer: LayerAttention, index: Tensor, topk: int) -> Tensor:
    """(B, P, H, d) attention of patches to the regions that theirs is routed to.

    Args:
        layer: a layer's attention.
        index: (R, n) as `blocks` has it, on the host.
        topk: regions that each region attends to.
    """
    special, parts = layer.special, (layer.query, layer.key, layer.value)
    query, *others = (gathered(part[:, :, special:], index) for part in parts)
    first = [part[:, :, :special].transpose(1, 2) for part in parts[1:]]
    chosen = route(query, others[0], index, topk)
    hidden = None if bool((index >= 0).all()) else upload(index < 0, query.device)
    step = max(len(index) // topk, 1)  # so that copies take no more than the keys themselves
    mixed = []
    for start in range(0, len(index), step):
        now = chosen[:, start : start + step]
        keys, values = (
            _taken(part, now, specials) for part, specials in zip(others, first, strict=True)
        )
        mask = None if hidden is None else _mask(hidden[now], special, query)
        queries = query[:, start : start + step].flatten(0, 1).transpose(1, 2)
        out = layer.kernel(queries, keys, values, mask)
        mixed.append(out.unflatten(0, now.shape[:2]))
    flat = index.flatten()
    place = (flat >= 0).nonzero()[:, 0]
    place = place[flat[place].argsort()]  # where each patch is among those of all regions
    return torch.cat(mixed, 1).flatten(1, 2)[:, upload(place, query.device)]


def _taken(part: Tensor, chosen: Tensor, special: Tensor) -> Tensor:
    """(B c, H, S + k n, d) rows of special tokens and of the regions chosen for each of c.

    Args:
        part: (B, R, n, H, d) of all regions.
        chosen: (B, c, k).
        special: (B, S, H, d).
    """
    images, regions = part.shape[:2]
    at = chosen + torch.arange(images, device=chosen.device)[:, None, None] * regions
    rows = part.flatten(0, 1).index_select(0, at.flatten())
    rows = rows.view(chosen.shape[0] * chosen.shape[1], -1, *part.shape[3:])
    if special.shape[1]:
        rows = torch.cat((special.repeat_interleave(chosen.shape[1], 0), rows), 1)
    return rows.transpose(1, 2)


def _mask(hidden: Tensor, special: int, like: Tensor) -> Tensor:
    """(B c, 1, 1, S + k n) what is added to scores, from (B, c, k, n) of what is not there."""
    flat = torch.nn.functional.pad(hidden.flatten(0, 1).flatten(1), (special, 0), value=False)
    mask = torch.zeros(flat.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill(flat, torch.finfo(like.dtype).min)[:, None, None]
