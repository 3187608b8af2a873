"""Tokens that go are put together, cell by cell of the grid, into the best of each cell.

Shapes: `G` images of equal size, `V` visual tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core import Reduction, VisualTokens
from foveate.core.ranking import bottom, marked, ranked


def pool_size(total: int, keep: float, cell: float) -> int:
    """How many tokens of an image the first step takes out: what is to go, and one for each cell.

    Args:
        total: tokens of the image.
        keep: share to keep; 1 takes out nothing.
        cell: side of a cell in tokens.
    """
    dropped = round(total * (1 - keep))
    return min(dropped + int(total / cell**2), total) if dropped else 0


def tile_coordinates(tokens: VisualTokens, newline: Tensor) -> Tensor:
    """(G, V, 3) frame or part of each token's image, and row and column there.

    A tiled image has two parts: its thumbnail, a square, and the map of its tiles, whose rows end
    in newlines, which count as a column.

    Args:
        tokens: all V tokens of each image.
        newline: (G, V) which are newlines.
    """
    single = torch.cat((tokens.frame[..., None], tokens.coordinates), -1)
    # Elsewhere than here, looking would hold up the device.
    if tokens.frames > 1 or (newline.device.type == "cpu" and not newline.any()):
        return single
    number = torch.arange(tokens.count, device=newline.device).expand_as(newline)
    first = newline.long().argmax(1, keepdim=True)
    second = (newline & (number > first)).long().argmax(1, keepdim=True)
    width = torch.where(second > first, second - first, 1)
    start = first - width + 1
    side = start.clamp(min=1).double().sqrt().round().long()
    tiled = number >= start
    row = torch.where(tiled, (number - start) // width, number // side)
    column = torch.where(tiled, (number - start) % width, number % side)
    parts = torch.stack((tiled.long(), row, column), -1)
    return torch.where(newline.any(1)[:, None, None], parts, single)


def cells(coordinates: Tensor, cell: float) -> Tensor:
    """(G, V) number of the cell that each token lies in; tokens of one image and cell share it.

    Args:
        coordinates: (G, V, 2 or more) row and column last; what precedes them, such as the frame,
            keeps cells apart.
        cell: side of a cell in tokens.
    """
    numbers = torch.cat((coordinates[..., :-2].long(), (coordinates[..., -2:] / cell).long()), -1)
    number = torch.zeros_like(numbers[..., 0])
    for axis in numbers.unbind(-1):
        number = number * (axis.max() + 1) + axis
    return number


def recycle(scores: Tensor, cell: Tensor, pool: int) -> tuple[Tensor, Tensor]:
    """Merge the lowest scores of each image, cell by cell, into the best of the cell's.

    Args:
        scores: (G, V), not negative.
        cell: (G, V) number of each token's cell, from 0.
        pool: how many tokens of each image are taken out.

    Returns:
        (G, V) the token that each goes into, itself where it stays; and (G, V) what it counts in
        the mean there: its score, or one where all scores of its cell are zero.
    """
    total = scores.shape[1]
    own = torch.arange(total, device=scores.device).expand_as(cell)
    pooled = torch.zeros_like(cell, dtype=torch.bool)
    pooled = pooled.scatter(1, bottom(scores, pool), True)
    first = int(cell.max()) + 1
    group = torch.where(pooled, cell, first + own)  # a token that stays is a group of its own
    order = ranked(scores)
    rank = torch.empty_like(order).scatter(1, order, own)
    best = rank.new_full((len(rank), first + total), total).scatter_reduce(1, group, rank, "amin")
    into = order.gather(1, best.gather(1, group))
    mass = scores.new_zeros(best.shape).scatter_add(1, group, scores).gather(1, group)
    return into, torch.where(mass > 0, scores, 1.0)


def merged(into: Tensor, mass: Tensor, count: int) -> Reduction:
    """The reduction of images in which `count` tokens are left, from what `recycle` returns."""
    stays = into == torch.arange(into.shape[1], device=into.device)
    index = marked(stays, count)
    if count == into.shape[1]:
        return Reduction(index)
    slot = (stays.long().cumsum(1) - 1).gather(1, into)
    return Reduction.mean(index, slot, mass)
