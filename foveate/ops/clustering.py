"""Density-peak clustering over nearest neighbours (DPC-KNN), batched.

Source: Du et al., "Study on density peaks clustering based on k-nearest neighbors and principal
component analysis", Knowledge-Based Systems 2016, in the form that token clustering uses: distances
are divided by the square root of the width, and every token joins its nearest center.

Shapes: `G` groups of equal size, `N` points of a group, `D` width of a point, `C` clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.ranking import TIE, highest, ranked


def dpc_knn(x: Tensor, clusters: int, k: int) -> tuple[Tensor, Tensor]:
    """Cluster the points of each group around the peaks of their density.

    Published token reducers add noise of 1e-6 to densities to break ties; here nothing is random
    and the lower index wins.

    Args:
        x: (G, N, D) points.
        clusters: C, from 1 to N.
        k: neighbours that make up a density, a point itself being the first; at most N count.

    Returns:
        (G, C) positions of the centers, the strongest peak first, and (G, N) the number (in that
        order) of the cluster that each point joins. A center joins its own.

    Cost: one product of all pairs, O(N² D), and O(N²) comparisons.
    """
    distance = squared_distances(x)
    centers = ranked(peaks(distance, k), 1.0)[:, :clusters]
    return centers, nearest_center(distance, centers)


def squared_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances divided by the width, in float32 or better.

    Args:
        x: (G, N, D) points.

    Returns:
        (G, N, N), exactly symmetric, so that mutual neighbours tie however the product was
        rounded; zeros on the diagonal, and between points that rounding alone tells apart.
    """
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    x = x - x.mean(1, keepdim=True)  # a common offset would cost precision in the product
    square = x.square().sum(-1)
    distance = torch.baddbmm(square[:, None] + square[..., None], x, x.mT, alpha=-2.0)
    distance = (distance + distance.mT).clamp_(min=0).div_(2 * x.shape[-1])
    distance.diagonal(dim1=1, dim2=2).zero_()
    near = TIE / x.shape[-1]
    return distance.masked_fill_(distance <= (square[:, None] + square[..., None]) * near, 0.0)


def peaks(distance: Tensor, k: int, noise: Tensor | None = None) -> Tensor:
    """How much each point is a peak: the logarithm of density times distance to a denser point.

    The density is exp(-mean squared distance to the k nearest points). The logarithm ranks as the
    product does, and does not underflow where points are far apart.

    Args:
        distance: (G, N, N) of `squared_distances`.
        k: neighbours that make up a density, the point itself being the first.
        noise: (N) or (G, N), at least 0, what is added to densities, so that one of two equal ones
            is the higher; `None` for nothing.

    Returns:
        (G, N), higher is more of a center. Where no point is denser, the largest distance of the
        group counts.
    """
    near = distance.topk(min(k, distance.shape[-1]), dim=-1, largest=False).values
    density = -near.mean(-1)
    if noise is not None:
        density = torch.logaddexp(density, noise.to(density).log())
    denser = density[:, None] > density[..., None]
    apart = distance.masked_fill(~denser, torch.inf).amin(-1)
    farthest = distance.amax((1, 2))[:, None].expand_as(apart)
    return density + torch.where(denser.any(-1), apart, farthest).log() / 2


def nearest_center(distance: Tensor, centers: Tensor) -> Tensor:
    """The number of the center that each point joins.

    Args:
        distance: (G, N, N) of `squared_distances`.
        centers: (G, C) positions of the centers.

    Returns:
        (G, N), in [0, C). Centers join themselves, also where they coincide.
    """
    rows = centers[..., None].expand(-1, -1, distance.shape[-1])
    joined = highest(-distance.gather(1, rows).mT)
    number = torch.arange(centers.shape[1], device=centers.device).expand_as(centers)
    return joined.scatter(1, centers, number)
