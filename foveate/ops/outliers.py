"""Outliers among numbers: the Local Outlier Factor in one dimension, for many images at once.

Shapes: `G` images, `N` numbers of each, `k` neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.ranking import TIE


def local_outliers(
    values: Tensor, neighbours: int, among: Tensor | None = None, threshold: float = 1.5
) -> Tensor:
    """Numbers that lie in a sparser region than their neighbours do, whether low or high.

    Source: Breunig et al., "LOF: Identifying Density-Based Local Outliers", SIGMOD 2000; a factor
    above 1.5 counts as an outlier, which is what scikit-learn's "auto" contamination means. In one
    dimension neighbours are neighbours in sorted order, so that N·2k distances replace N².

    Args:
        values: (G, N).
        neighbours: k; where fewer other numbers take part, all of them.
        among: (G, N) which numbers take part; `None` for all.
        threshold: factor above which a number is an outlier.

    Returns:
        (G, N) booleans; `False` for numbers that do not take part.
    """
    among = torch.ones_like(values, dtype=torch.bool) if among is None else among
    width = min(neighbours, values.shape[1] - 1)
    if width < 1:
        return torch.zeros_like(among)
    ranked, order = values.masked_fill(~among, torch.inf).sort(dim=1)
    near, who = _neighbours(ranked, width)
    counts = (among.sum(1) - 1).clamp(max=width)[:, None, None]
    real = torch.arange(width, device=values.device) < counts
    reach_of = near.gather(2, (counts - 1).clamp(min=0).expand(-1, near.shape[1], 1))[..., 0]
    reach = torch.maximum(near, _pick(reach_of, who)).masked_fill(~real, 0.0)
    density = counts[..., 0] / (reach.sum(-1) + counts[..., 0] * 1e-10)
    around = _pick(density, who).masked_fill(~real, 0.0).sum(-1) / counts[..., 0]
    found = (around > threshold * density) & (ranked < torch.inf)
    return torch.zeros_like(among).scatter(1, order, found)


def _neighbours(ranked: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Distances to the nearest other numbers, ascending, and their indices; (G, N, k) each.

    Args:
        ranked: (G, N) ascending; those that take no part are infinite.
        width: k.
    """
    edge = ranked.new_full((len(ranked), width), torch.inf)
    window = torch.cat((edge, ranked, edge), 1).unfold(1, 2 * width + 1, 1)
    distance = (window - ranked[..., None]).abs()
    near = (ranked.abs() * TIE).clamp(max=torch.finfo(torch.float32).max)
    distance = distance.masked_fill(distance <= near[..., None], 0.0)
    distance[..., width] = torch.inf
    near, offset = distance.nan_to_num(nan=torch.inf, posinf=torch.inf).topk(
        width, dim=-1, largest=False
    )
    here = torch.arange(ranked.shape[1], device=ranked.device)[:, None]
    return near, (here + offset - width).clamp(0, ranked.shape[1] - 1)


def _pick(values: Tensor, who: Tensor) -> Tensor:
    """(G, N, k) of (G, N), at (G, N, k) indices."""
    return values.gather(1, who.flatten(1)).view(who.shape)
