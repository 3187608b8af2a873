"""GTP-ViT: in every encoder layer, send the least important tokens along a graph to the others.

Paper: Xu et al., "GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation",
arXiv:2311.03035 (WACV 2024). Reference code: Ackesnal/GTP-ViT @ 97a1178; nothing of it is copied.
Differs from the reference: survivors stay in raster order (there: the best first, which means
nothing to attention); one token stays at least (there: P = 0 removes all); the graph links frames
of a video only by meaning; without a class token a patch has as many neighbours in meaning as with
one (there: one more); registers and distillation tokens are special tokens too. `r` is the
release's P, `sparsity` its theta, and `score` its selection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core import (
    Keep,
    LayerAttention,
    ModelFacts,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)
from foveate.core.fields import Natural, Positive, Range
from foveate.core.layerwise import Layerwise
from foveate.core.ranking import marked, top
from foveate.core.step import Effect
from foveate.errors import UnsupportedModelError
from foveate.ops.map_attention import attend_with_maps

Score = Literal[
    "mixed-max", "mixed-mean", "sum-max", "received-max", "received-mean", "diagonal-max",
    "diagonal-mean", "cls-max", "cls-mean", "cosine-max", "cosine-mean",
]  # fmt: skip


@register(
    "gtp-vit",
    stage="vision",
    does="drops and propagates to neighbours",
    paper="Xu et al. 2023, arXiv:2311.03035",
)
@dataclass(frozen=True)
class GTPViT(Layerwise):
    """Drop the lowest scores of every layer, after adding a part of them to their neighbours.

    The graph is built once, on the input of the first of these layers: a patch is linked to the
    patches around it, and to those most like it. Its weights are normed by degrees.

    Args:
        r: patches removed in each layer, or one number for each layer from the first (0 after).
        keep: what survives the last layer, a share or a count, by equal r in all layers; `None`
            uses `r`.
        alpha: what survivors get of the tokens linked to them.
        neighbours: patches that a patch is linked to for their likeness.
        graph: which links there are: of the grid (`spatial`), of likeness (`semantic`), or both.
        score: what is important, of a layer's attention: how much a patch attends to itself
            (`diagonal`), what it receives (`received`), the product of both (`mixed`) or their sum,
            the class token's (`cls`), or that it attends otherwise than others (`cosine`); the
            maximum or the mean over heads.
        sparsity: share of each attention map that is not set to zero, the largest entries.
        token_scale: count survivors by what they were given, in attention.
        positions: of the survivors in a language model; `None` makes them consecutive
            (`renumbered`) where positions are single numbers, `original` leaves them.

    Cost: one product of all patches with each other in the first layer; after it K x P weights in
    each. Attention maps are looked at while attention is computed, and never held together.
    """

    r: Natural | tuple[Natural, ...] = 4
    keep: Keep | None = None
    alpha: Annotated[float, Range(0)] = 0.1
    neighbours: Positive = 8
    graph: Literal["mixed", "spatial", "semantic"] = "mixed"
    score: Score = "mixed-max"
    sparsity: Annotated[float, Range(0, 1, above=True)] = 1.0
    token_scale: bool = False
    positions: Positions | None = None

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """A step within each layer that is read, whose attention is looked at.

        Raises:
            UnsupportedModelError: the score is the class token's, and there is none.
        """
        if self.score.startswith("cls") and not model.class_token:
            raise UnsupportedModelError(
                f"gtp-vit with score={self.score!r} needs a class token, but the encoder of this "
                f"{model.model_type} has none; score='mixed-max' works"
            )
        scaled: tuple[Effect, ...] = ("proportional",) if self.token_scale else ()
        return self.layer_steps(model, effects=("attend", *scaled))

    def attend(self, tokens: VisualTokens, layer: LayerAttention) -> Tensor:
        """The layer's attention, sparse if it is to be; notes scores, and the graph at first."""
        if tokens.quota == tokens.count:
            return layer.plain()
        if "graph" not in tokens.memory:
            tokens.memory["graph"] = self.links(tokens)
        scores: list[Tensor] = []

        def look(weights: Tensor) -> Tensor:
            weights = sparse(weights, self.sparsity)
            scores.append(self.scores(weights.detach().float(), layer.special))
            return weights

        mixed = attend_with_maps(layer, look)
        tokens.memory["scores"] = layer.of_tokens(torch.cat(scores))
        return mixed

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Drop the lowest scores, and give survivors their part of them."""
        scores, at = tokens.memory["scores"], tokens.index
        kept = top(scores, count)
        gone = torch.ones_like(scores, dtype=torch.bool).scatter(1, kept, False)
        removed = marked(gone, tokens.count - count)
        image = torch.arange(len(gone), device=gone.device)[:, None, None]
        to, of = at.gather(1, kept)[:, :, None], at.gather(1, removed)[:, None]
        linked, norm = tokens.memory["graph"]
        residual = self.alpha * linked[image, to, of] * norm[image, to] * norm[image, of]
        mass = tokens.sizes.gather(1, kept)
        if self.token_scale:
            given = tokens.sizes.gather(1, removed)[..., None].to(residual)
            mass = mass + torch.matmul(residual, given)[..., 0]
        return Reduction(kept, removed=removed, residual=residual, mass=mass)

    @torch.no_grad()
    def links(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """(G, T, T) which of the T positions of tokens are linked, and (G, T) the norm of each: a
        link weighs the product of the norms of its ends.
        """
        total, device = tokens.total or int(tokens.index.max()) + 1, tokens.index.device
        linked = torch.zeros(len(tokens.index), total, total, dtype=torch.bool, device=device)
        image = torch.arange(len(linked), device=linked.device)[:, None, None]
        here = torch.zeros_like(linked[:, : tokens.count, : tokens.count])
        if self.graph != "semantic":
            here |= beside(tokens)
        if self.graph != "spatial":
            here |= alike(tokens.x, self.neighbours)
        linked[image, tokens.index[:, :, None], tokens.index[:, None]] = here
        return linked, linked.sum(-1).clamp(min=1).float().rsqrt()

    def scores(self, weights: Tensor, special: int) -> Tensor:
        """(b, N) scores of rows from (b, H, N, N) attention; special rows' mean nothing."""
        kind, _, how = self.score.partition("-")

        def over_heads(values: Tensor) -> Tensor:
            return values.mean(1) if how == "mean" else values.amax(1)

        if kind == "cls":
            return over_heads(weights[:, :, 0])
        if kind == "cosine":
            rows = F.normalize(over_heads(weights), dim=-1)
            return -torch.matmul(rows, rows[:, special:].sum(1)[..., None])[..., 0]
        itself = over_heads(weights.diagonal(dim1=2, dim2=3))
        if kind == "diagonal":
            return itself
        received = over_heads(weights.sum(2))
        if kind == "received":
            return received
        return itself + received if kind == "sum" else itself * received


def sparse(weights: Tensor, share: float) -> Tensor:
    """(b, H, N, N) attention whose smallest entries are zero, but for a share of each map."""
    entries = weights.shape[2] * weights.shape[3]
    zeros = int(entries * (1 - share))
    if not zeros:
        return weights
    least = weights.detach().flatten(2).kthvalue(zeros, dim=-1).values
    return weights * (weights >= least[..., None, None])


def beside(tokens: VisualTokens) -> Tensor:
    """(G, V, V) which patches of a frame touch, at a side or a corner."""
    place = torch.cat((tokens.frame[..., None], tokens.coordinates), -1)
    apart = (place[:, :, None] - place[:, None]).abs()
    return (apart[..., 0] == 0) & (apart[..., 1:].amax(-1) == 1)


def alike(x: Tensor, neighbours: int) -> Tensor:
    """(G, V, V) which others are most like each of (G, V, D) tokens; `i -> j` is not `j -> i`."""
    values = F.normalize(x.float(), dim=-1)
    cosine = torch.matmul(values, values.transpose(1, 2))
    cosine.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    least = cosine.topk(min(neighbours, x.shape[1]), dim=-1).values[..., -1:]
    return (cosine >= least) & (cosine > -torch.inf)
