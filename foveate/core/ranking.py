"""Ranking: which scores are highest, where rounding decides nothing.

An image gets scores that differ in their last bits from one batch to another, as kernels sum up in
an order that depends on the shape. Scores no farther apart than that are ties, and the lower index
wins, so that an image keeps the same tokens alone and beside others.
"""

from __future__ import annotations

import torch
from torch import Tensor

TIE = 2.0**-20
"""Scores tie that differ by less than this share of them, or of a scale: 16 roundings of float32,
and less than the 1e-6 down to which published selections can be told apart."""

Scale = Tensor | float | None
"""What scores are differences or sums of, such as 1 for cosines; `None` for their own size, which
suits what is a product or a share, such as attention."""


def near_of(scores: Tensor, scale: Scale) -> Tensor | float:
    """How far apart ties may be."""
    if scale is None:
        exact = scores.to(torch.promote_types(scores.dtype, torch.float32))  # of half precision too
        return (exact.abs() * TIE).clamp(max=torch.finfo(torch.float32).max)
    return scale * TIE


def top(scores: Tensor, count: int, scale: Scale = None) -> Tensor:
    """Positions of the highest scores, in ascending order.

    Args:
        scores: (..., V).
        count: how many, K.
        scale: as in the module, (..., 1) if it is a tensor.

    Returns:
        (..., K).
    """
    total = scores.shape[-1]
    if not 0 < count < total:
        return torch.arange(total, device=scores.device).expand(scores.shape)[..., :count]
    value, order = scores.topk(count, dim=-1, sorted=False)
    least = value.amin(-1, keepdim=True)
    near = near_of(least, scale)
    # Elsewhere than here, looking for ties would hold up the device.
    if scores.device.type == "cpu" and int((scores >= least - near).sum()) == value.numel():
        return order.sort(dim=-1).values
    chosen = _chosen(scores, count, least, near)
    position = torch.arange(total, device=scores.device).expand(scores.shape)
    target = torch.where(chosen, chosen.cumsum(-1) - 1, count)
    index = position.new_zeros(*scores.shape[:-1], count + 1).scatter_(-1, target, position)
    return index[..., :count]


def _chosen(scores: Tensor, counts: Tensor | int, least: Tensor, near: Tensor | float) -> Tensor:
    """(..., V) the highest scores, with as many of those that tie with the least as have room."""
    above = scores > least + near
    tied = ~(above | (scores < least - near))
    room = counts - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def among_top(scores: Tensor, counts: Tensor, most: int, scale: Scale = None) -> Tensor:
    """Which scores are the highest, where that is another number for each row.

    Args:
        scores: (G, V).
        counts: (G, 1) how many.
        most: a bound of all counts, from 1 to V.
        scale: as in the module, (G, 1) if it is a tensor.

    Returns:
        (G, V) bool.
    """
    value = scores.topk(most, dim=-1).values
    least = value.gather(-1, (counts - 1).clamp(min=0))
    return _chosen(scores, counts, least, near_of(least, scale)) & (counts > 0)


def bottom(scores: Tensor, count: int, scale: Scale = None) -> Tensor:
    """Positions of the lowest scores, in ascending order; arguments as in `top`."""
    return top(-scores, count, scale)


def ranked(scores: Tensor, scale: Scale = None) -> Tensor:
    """Positions of all scores, the highest first; those of a run of ties in ascending order.

    Args:
        scores: (..., V).
        scale: as in the module, (..., 1) if it is a tensor.
    """
    value, order = scores.sort(dim=-1, descending=True, stable=True)
    apart = value[..., :-1] - value[..., 1:] > near_of(value[..., :-1], scale)
    if scores.device.type == "cpu" and bool(apart.all()):
        return order
    run = torch.nn.functional.pad(apart.float().cumsum(-1), (1, 0))
    return torch.empty_like(run).scatter_(-1, order, run).argsort(dim=-1, stable=True)


def marked(mask: Tensor, count: int) -> Tensor:
    """(..., count) positions, ascending, at which a mask (..., V) holds; so many in each row."""
    return (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[..., :count]


def highest(scores: Tensor, scale: Scale = None) -> Tensor:
    """Position of the highest score of the last axis.

    Args:
        scores: (..., V).
        scale: as in the module, (..., 1) if it is a tensor.
    """
    most = scores.amax(-1, keepdim=True)
    return (scores >= most - near_of(most, scale)).to(torch.uint8).argmax(-1)
