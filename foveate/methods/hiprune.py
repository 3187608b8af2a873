"""HiPrune: keep what the encoder looks at in the middle, what lies beside it, and at the end.

Paper: Liu et al., "HiPrune: Hierarchical Attention for Efficient Token Pruning in Vision-Language
Models", arXiv:2508.00553 (its prompt-aware variant HiPrune++ is not here). Reference code:
Danielement321/HiPrune @ 6e83a12.
Differs from the reference: any batch and several images work, each with a budget of its own; only
the sums of attention are computed, not the maps; buffers are neighbours in the grid (there: in
raster order, so that they wrap around the image's edge); a buffer cannot be chosen a second time as
a register (on Qwen2.5-VL there it can, and fewer tokens survive than asked for); where anchors and
buffers exceed the budget, the most attended of them stay (there: an error); where a model puts
tiles together (LLaVA-NeXT), one choice is made among all tokens of an image, in one line without a
grid (there: one in the grid of each crop). `as_released` brings back neighbours in raster order,
and on Qwen2.5-VL registers that are buffers already. The default object layer is scaled to the
encoder at hand; it is published for CLIP (9 of 24, from 1) and Qwen2.5-VL (16 of 32), and that
encoders with a class token follow the first and others the second is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.core import (
    Keep,
    Method,
    ModelFacts,
    Need,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)
from foveate.core.fields import Natural, UnitFloat
from foveate.core.ranking import ranked, top
from foveate.core.transfer import upload
from foveate.errors import InputError, LayerError


@register(
    "hiprune",
    stage="pre_llm",
    does="anchors, neighbours, registers",
    needs=("received_attention",),
    paper="Liu et al. 2025, arXiv:2508.00553",
)
@dataclass(frozen=True)
class HiPrune(Method):
    """Keep anchors and their neighbours (buffers), and fill up with registers.

    Anchors are the tokens that receive most attention in a middle layer, the object layer;
    registers are those that receive most in the layer the language model sees.

    Args:
        keep: what survives; a count is the release's retention. Shares are rounded half to even.
        alpha: share of the budget meant for anchors and buffers, in [0, 1]; an anchor stands for
            five tokens.
        layer: the object layer, 0-based (the release counts from 1). `None` takes it at a third of
            the depth of encoders with a class token, and just before the middle of others.
        as_released: `llava` or `qwen` chooses neighbours, and on `qwen` registers, as that half of
            the release does; on `qwen` images of one size must then be run one by one.
        positions: `None` gives survivors consecutive positions (`renumbered`), as the reference
            does, where positions are single numbers; `original` leaves them where they were.

    Cost: the attention logits of two encoder layers, summed up in chunks.
    """

    keep: Keep = 192
    alpha: UnitFloat = 0.1
    layer: Natural | None = None
    as_released: Literal["llava", "qwen"] | None = None
    positions: Positions | None = None
    rounding = round

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector, scored in the object layer and in the last one.

        Raises:
            LayerError: the object layer lies outside the encoder.
        """
        depth = model.vision_layers
        scaled = depth // 3 if model.class_token else max(depth // 2 - 1, 0)
        layer = scaled if self.layer is None else self.layer
        if depth and not 0 <= layer < depth:
            raise LayerError(
                f"hiprune asks for layer {layer}, but the vision encoder has {depth} layers; use 0 "
                f"to {depth - 1}"
            )
        layers = (layer, model.feature_layer)
        return (Step("pre_llm", needs=(Need("received_attention", layers),)),)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep anchors, then buffers, then registers, `count` in all, in raster order."""
        objects, deep = tokens.signal("received_attention").float().unbind(1)
        anchors = top(objects, round(count * self.alpha / 5))
        if self.as_released == "qwen":
            return Reduction(_released_union(_flat_neighbours(tokens, anchors), deep, count))
        neighbours = _flat_neighbours if self.as_released == "llava" else _neighbours
        # Shares of the highest are at most 1, so these kinds of tokens rank one after another.
        most = deep.amax(-1, keepdim=True).clamp(min=torch.finfo(deep.dtype).tiny)
        ranks = torch.add(deep / most, neighbours(tokens, anchors), alpha=2).scatter_(1, anchors, 4)
        return Reduction.top(ranks, count, scale=1.0)


def _neighbours(tokens: VisualTokens, anchors: Tensor) -> Tensor:
    """(G, V) whether a token is one of the (G, A) anchors or next to one in its frame's grid."""
    height, width = tokens.grid
    cells, line = height * width, width + 1
    # Cells of grids with an empty column beside each and an empty row between them; one cell
    # after the last grid is for all tokens that are in none.
    cell = tokens.index.clamp(max=tokens.frames * cells)
    cell = torch.add(cell + cell // width, cell // cells, alpha=line)
    offsets = upload([line, line - 1, line + 1, 0, 2 * line], cell.device)
    near = (cell.gather(1, anchors)[..., None] + offsets).flatten(1)
    room = (tokens.frames * (height + 1) + 3) * line
    marks = torch.zeros(len(near), room, dtype=torch.bool, device=cell.device)
    return marks.scatter_(1, near, True)[:, line:].gather(1, cell)


def _flat_neighbours(tokens: VisualTokens, anchors: Tensor) -> Tensor:
    """(G, V) the same by distance in raster order, clamped at both ends, as released."""
    width, last = tokens.grid[1], tokens.count - 1
    offsets = upload([0, -1, 1, -width, width], anchors.device)
    near = (anchors[..., None] + offsets).clamp(0, last).flatten(1)
    return torch.zeros_like(tokens.index, dtype=torch.bool).scatter(1, near, True)


def _released_union(near: Tensor, deep: Tensor, count: int) -> Tensor:
    """(G, K) kept tokens where one is taken off the registers' scores to exclude buffers.

    The release sums attention over queries, so that the mean over an image's tokens is 1 and many
    a buffer is still in front: it is then chosen twice, and K falls below `count`.
    """
    sums = deep / deep.mean(-1, keepdim=True)
    order = ranked(sums - near.float(), 1.0)
    rank = order.argsort(dim=-1)
    kept = near | (rank < count - near.sum(-1, keepdim=True))
    if int(kept.sum(-1).unique().numel()) > 1:
        raise InputError(
            "hiprune as released keeps different numbers of tokens of these images, which have "
            "the same size; run them one by one, or leave as_released out"
        )
    return kept.nonzero()[:, 1].view(len(kept), -1)
