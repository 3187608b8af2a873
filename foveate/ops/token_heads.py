"""Heads that label tokens, for methods which decide by what a token shows.

Shapes: `G` images, `N` tokens of each, `D` width, `C` classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.method import by_count
from foveate.core.ranking import marked
from foveate.core.transfer import upload
from foveate.errors import FoveateError
from foveate.io.quoting import quoted


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


def probabilities(logits: Tensor, present: Tensor | None = None) -> Tensor:
    """(G, N, C) probability of each class.

    Args:
        logits: (G, N, C) of tokens, or of masks.
        present: (G, C, 2) logits of a class being there or not, with those of masks.
    """
    if present is None:
        return logits.softmax(-1)
    return present.softmax(-1)[:, None, :, 0] * logits.sigmoid()


def label(
    head: Callable[[Tensor], Any], x: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What a head says: (G, N, C) logits of tokens, and (G, C, 2) of classes if it has those.

    Args:
        head: given tokens (G, N, D), it returns their logits (G, N, C), or logits of masks
            (G, C, N) and of classes (G, C, 2).
        x: (G, N, D) tokens.
        valid: (G, N) which are tokens and no padding, which a head never sees; `None` for all.

    Raises:
        FoveateError: the head returns something else.
    """
    if valid is None:
        return _parts(head(x), x)
    logits, present = None, None
    for count, members in by_count(valid.sum(1)).items():
        rows = upload(members, x.device)
        real = marked(valid[rows], count)
        seen = x[rows].gather(1, real[..., None].expand(-1, -1, x.shape[-1]))
        of_tokens, of_classes = _parts(head(seen), seen)
        if logits is None:
            logits = of_tokens.new_zeros(*x.shape[:2], of_tokens.shape[-1])
            present = (
                None if of_classes is None else of_classes.new_zeros(len(x), *of_classes.shape[1:])
            )
        logits = logits.index_put((rows[:, None], real), of_tokens)
        if present is not None and of_classes is not None:
            present = present.index_put((rows,), of_classes)
    assert logits is not None  # there is an image
    return logits, present


def _parts(said: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a head returns: (G, n, C) logits, and (G, C, 2) of classes if it has those.

    Raises:
        FoveateError: it returns something else.
    """
    logits, present = said if isinstance(said, tuple) else (said, None)
    if present is not None:
        logits = logits.mT
    fits = isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == x.shape[:2]
    if not fits or (present is not None and present.shape != (len(x), logits.shape[-1], 2)):
        raise FoveateError(
            f"a head returns logits (G, n, C) of tokens (G, n, D), or logits of masks "
            f"(G, C, n) and of classes (G, C, 2); for tokens {tuple(x.shape)} it returned "
            f"{quoted(said if not isinstance(said, Tensor) else tuple(said.shape))}"
        )
    return logits, present
