"""Boxes: where visual tokens lie in what the processor showed the model."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.tokens import Shape


def cells(height: int, width: int) -> Tensor:
    """(height * width, 4) left, top, right and bottom edge of the cells of a grid, in [0, 1]."""
    top, left = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    edges = torch.stack((left, top, left + 1, top + 1), -1).flatten(0, 1)
    return edges / torch.tensor([width, height, width, height])


def cells_of(shape: Shape) -> Tensor:
    """(V, 4) cells of the grid, once for each frame; NaN for tokens after the last."""
    boxes = cells(*shape.grid).repeat(shape.frames, 1)
    return torch.cat((boxes, torch.full((shape.total - len(boxes), 4), torch.nan)))


def plain_grid(boxes: Tensor) -> tuple[int, int] | None:
    """(height, width) of the grid whose cells these boxes are, in order, or `None`."""
    if not len(boxes) or bool(boxes.isnan().any()):
        return None
    height, width = (1 / (boxes[0, 2:] - boxes[0, :2])).round().int().tolist()[::-1]
    if height * width != len(boxes) or not torch.allclose(boxes, cells(height, width), atol=1e-4):
        return None
    return height, width


def passes(boxes: Tensor) -> list[Tensor]:
    """Numbers of the tokens in each pass over the image, the pass with the largest boxes first.

    Where a thumbnail comes before tiles, the tokens cover the image twice.
    """
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).nan_to_num().double()
    covered = area.cumsum(0)
    last = max(int((covered[-1] - 0.05).ceil()) - 1, 0) if len(boxes) else 0
    number = (covered - area / 2).floor().clamp(max=last)
    members = [((number == n) & (area > 0)).nonzero()[:, 0] for n in range(last + 1)]
    return sorted(members, key=lambda member: -float(area[member].mean()))
