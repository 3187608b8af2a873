"""Diversity: how alike tokens are, and greedy choices that are unlike each other.

Shapes: `G` images of equal size, `V` tokens of an image, `K` picked, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.core.ranking import TIE, highest


def with_lengths(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) rows in float32 or better, and (..., 1) what they are divided by to have length one:
    1 for rows of zero length.
    """
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    norm = x.norm(dim=-1, keepdim=True)
    return x, norm.masked_fill(norm == 0, 1)


def normalize(x: Tensor) -> Tensor:
    """Rows of length one, in float32 or better; rows of zero length stay zero."""
    x, length = with_lengths(x)
    return x / length


def cosine_distance(x: Tensor) -> Tensor:
    """Cosine distance of all pairs of tokens, in float32 or better.

    Args:
        x: (G, V, D) token values.

    Returns:
        (G, V, V) one minus the cosine; tokens of zero length have distance 1 to all.
    """
    x = normalize(x)
    cosine = x @ x.mT
    return torch.sub(cosine.new_ones(()), cosine, out=cosine)


def nearest_other(distance: Tensor) -> Tensor:
    """(G, V) distance of each token to its nearest other one, of (G, V, V)."""
    # A token's distance to itself is its smallest, so the second smallest is its neighbour's.
    return distance.topk(min(2, distance.shape[-1]), dim=1, largest=False).values[:, -1]


def select_diverse(
    distance: Tensor,
    count: int,
    first: Tensor | None = None,
    gather: Callable[..., Tensor] = torch.minimum,
) -> Tensor:
    """Greedy choice of tokens far from those already picked; the lower index wins ties.

    Args:
        distance: (G, V, V) pairwise distances. Its diagonal is overwritten.
        count: tokens to pick, K, from 1 to V.
        first: (G, V) scores that decide the first pick; `None` takes the token whose nearest other
            one is farthest away.
        gather: how distances to several picks become one: `torch.minimum` spreads the picks
            (max-min), `torch.add` maximises the sum of their distances.

    Returns:
        (G, K) token positions in the order of their selection.
    """
    images = torch.arange(len(distance), device=distance.device)
    scale = 1.0 if first is None else float(distance.shape[-1])
    picks = [highest(nearest_other(distance) if first is None else first, scale)]
    # With this diagonal a picked token can never win again.
    distance.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    far = distance[images, picks[0]]
    for summed in range(1, count):
        picks.append(highest(far, summed if gather is torch.add else 1.0))
        gather(far, distance[images, picks[-1]], out=far)
    return torch.stack(picks, dim=-1)


def select_determinant(
    kernel: Tensor, count: int, scale: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Greedy choice of tokens whose kernel has a large determinant.

    Each pick adds the largest factor to the determinant: a Cholesky factorisation that pivots on
    the largest rest of the diagonal, of which only the picked rows are worked out. Source: Chen et
    al., "Fast Greedy MAP Inference for Determinantal Point Process", arXiv:1709.05135.

    Args:
        kernel: (G, V, V) symmetric, without negative eigenvalues.
        count: tokens to pick, K, from 1 to V.
        scale: size of what entries are rounded from, against the largest entry of the diagonal;
            (G, 1) if it is a tensor. Factors closer than rounding tie, and the lower index wins.

    Returns:
        (G, K) token positions in the order of their selection, and (G, K) the factor each added:
        what of its diagonal entry the picks before it do not explain. Zero where that is rounding:
        the kernel's rank is used up, and the pick says nothing.
    """
    images = torch.arange(len(kernel), device=kernel.device)
    rest = kernel.diagonal(dim1=1, dim2=2).clone()
    scale = scale * rest.amax(-1, keepdim=True)
    floor = (scale * TIE).expand_as(rest).clone()
    least = _least_gain(rest, floor)
    factors = kernel.new_empty(len(kernel), count, kernel.shape[-1])
    picks, gains = [], []
    for step in range(count):
        pick = highest(rest, scale)[:, None]
        gain = rest.gather(1, pick)
        picks.append(pick)
        gains.append(gain)
        row = _explain(kernel[images, pick[:, 0]], factors[:, :step], pick)
        root = torch.where(gain > least.gather(1, pick), gain, torch.inf).rsqrt()
        row = torch.mul(row, root, out=factors[:, step])
        floor.scatter_(1, pick, -torch.inf)  # which is never picked again
        rest.addcmul_(row, row, value=-1).scatter_(1, pick, -torch.inf)
        torch.maximum(rest, floor, out=rest)  # below, rounding would order what says nothing
    order, gain = torch.cat(picks, dim=-1), torch.cat(gains, dim=-1)
    return order, gain.masked_fill(gain <= least.gather(1, order), 0.0)


def _least_gain(diagonal: Tensor, floor: Tensor) -> Tensor:
    """(G, V) the gain up to which a pick added rounding alone.

    That is V roundings of its entry, or one of the largest entry. Divided by its root, rounding
    would grow.
    """
    return torch.maximum(diagonal * (torch.finfo(diagonal.dtype).eps * diagonal.shape[-1]), floor)


def _explain(row: Tensor, factors: Tensor, pick: Tensor) -> Tensor:
    """(G, V) the kernel's row of a pick (G, 1), less what earlier picks' factors explain of it."""
    if not factors.shape[1]:
        return row
    images = torch.arange(len(row), device=row.device)
    mixed = factors[images, :, pick[:, 0]][:, None]
    return torch.baddbmm(row[:, None], mixed, factors, alpha=-1)[:, 0]
