"""Heads that label tokens, for methods which decide by what a token shows.

Shapes: `G` images, `N` tokens of each, `D` width, `C` classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearHead(nn.Module):
    """A norm and one linear map.

    Args:
        width: D.
        classes: C.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(G, N, C) logits of (G, N, D) tokens."""
        return self.classify(self.norm(x.to(self.norm.weight.dtype)))


class QueryHead(nn.Module):
    """A learned query for each class, which attends to the tokens (attention to mask).

    After Zhang et al., "SegViT", arXiv:2210.05844: the scores of the last attention are the masks.
    Not its release: layers are pre-norm, and queries do not attend to each other.

    Args:
        width: D; the head is half as wide.
        classes: C.
        layers: attentions, each followed by an MLP.
        heads: of each attention.
    """

    def __init__(self, width: int, classes: int, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        inner = width // 2
        self.project = nn.Sequential(nn.Linear(width, inner), nn.LayerNorm(inner))
        self.queries = nn.Parameter(torch.zeros(classes, inner).normal_(std=0.02))
        self.layers = nn.ModuleList(_QueryLayer(inner, heads) for _ in range(layers))
        self.present = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of (G, N, D) tokens, (G, C, N) logits of masks, and (G, C, 2) of a class being there or
        not.
        """
        tokens = self.project(x.to(self.queries.dtype))
        queries, masks = self.queries.expand(len(x), -1, -1), tokens
        for layer in self.layers:
            queries, masks = layer(queries, tokens)
        return masks, self.present(queries)


class _QueryLayer(nn.Module):
    """Queries attend to tokens, and pass an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (
            make(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for make, part in (
                (self.query, self.norm1(queries)),
                (self.key, tokens),
                (self.value, tokens),
            )
        )
        scores = query @ key.mT * query.shape[-1] ** -0.5
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        queries = queries + self.output(mixed)
        return queries + self.mlp(self.norm2(queries)), scores.mean(1)
