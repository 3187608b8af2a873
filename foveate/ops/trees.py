"""Tokens of a video that merge along trees through its frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.core.video import Survivors
from foveate.ops.clustering import dpc_knn

NEIGHBOURS = 7
"""Tokens that make up a density, a token itself among them; fewer where clusters are fewer."""


class Trees:
    """Tokens of a segment, each merged into one of the frame before or the root of a tree.

    Args:
        x: (T, P, D) tokens by frame.
        joins: (T, P) the token of the frame before that each merges into, or -1.
        selected: (T, P) tokens that are in no tree.
        as_released: what a tree is divided by.
    """

    def __init__(self, x: Tensor, joins: Tensor, selected: Tensor, as_released: bool) -> None:
        frames, cells = joins.shape
        own = torch.arange(frames * cells, device=x.device).view_as(joins)
        roots = [own[0]]
        for t in range(1, frames):
            roots.append(torch.where(joins[t] < 0, own[t], roots[-1][joins[t]]))
        self.root = torch.stack(roots).flatten()
        parent = torch.where(joins < 0, own, own - own % cells - cells + joins).flatten()
        # As released, a root counts itself and what merges into it, and not what merges into that.
        members = torch.bincount(parent if as_released else self.root, minlength=own.numel())
        self.share = 1 / members[self.root].float()
        x = x.flatten(0, 1)
        self.x = torch.zeros_like(x).index_add_(0, self.root, x * self.share[:, None].to(x))
        self.rooted = (joins < 0) & ~selected
        self.member = ~selected.flatten()

    def cluster_into(self, survivors: Survivors, position: Tensor, count: int) -> None:
        """Cluster the trees of each frame by their roots.

        Args:
            survivors: where clusters go.
            position: (T, P) of the segment's tokens in the video.
            count: clusters of all frames together, rounded up in each.
        """
        total = int(self.rooted.sum())
        if not total or not count:
            return
        cells, ratio = self.rooted.shape[1], count / total
        slot, index = torch.full_like(self.root, -1), []
        weight, used = torch.zeros_like(self.share), 0
        for t, rooted in enumerate(self.rooted):
            tree = rooted.nonzero()[:, 0] + t * cells
            if not len(tree):
                continue
            center = joined = torch.arange(len(tree), device=tree.device)
            clusters = math.ceil(len(tree) * ratio)
            if ratio < 1:
                found = dpc_knn(self.x[None, tree], clusters, min(clusters, NEIGHBOURS))
                center, joined = found[0][0], found[1][0]
            slot[tree] = joined + used
            weight[tree] = 1 / torch.bincount(joined)[joined].float()
            index.append(position.flatten()[tree[center]])
            used += len(center)
        root = self.root[self.member]
        members = position.flatten()[self.member]
        share = weight[root] * self.share[self.member]
        survivors.merge(torch.cat(index), members, slot[root], share)
