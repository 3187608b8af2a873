"""HoliTom, inside the language model: fold the less attended half of the tokens into the rest.

Paper: Shao et al., "HoliTom: Holistic Token Merging for Fast Video Large Language Models",
arXiv:2505.21334 (inner-LLM merging, the "M" of the tables). Reference code: cokeshao/HoliTom @
e9b2972. The part before the language model is the method `holitom`; combine them as
`[HoliTom(...), HoliTomInner(...)]`.
Differs from the reference: the layer whose attention ranks keeps its causal mask. The release asks
that layer for attention maps under SDPA, which has no mask to hand over then, so all its tokens see
the whole prompt; which tokens it keeps is the same, but states and cache of that layer differ.
This is not offered: it would mean to run a causal model without its mask. Any batch, several images
and padding work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core import Keep, Positions, Reduction, Scheduled, Scorer, VisualTokens, register
from foveate.core.fields import Natural
from foveate.core.ranking import highest


@register(
    "holitom-inner",
    stage="llm",
    does="folds the less attended half",
    needs=("text_attention",),
    paper="Shao et al. 2025, arXiv:2505.21334",
)
@dataclass(frozen=True)
class HoliTomInner(Scheduled, Scorer):
    """Keep the tokens that the last prompt token attends to, and fold each other one into the most
    similar of them.

    Tokens are folded in raster order, each time half and half: of those that go into one survivor,
    the last has weight 1/2, the one before 1/4, and so on; the survivor's own state has what is
    left.

    Args:
        layers: decoder layers before which tokens are merged (HOLITOM_k), from 1; the layer before
            ranks. `None` scales the published 18 of 28 layers to the model at hand.
        keep: what survives each merge, 1 - HOLITOM_r; shares are of the original count and are
            rounded half to even.
        positions: `None` leaves survivors at their positions (`original`), as the reference does;
            `renumbered` makes them consecutive.

    Cost: one key projection of all tokens, one query row, and cosines of every dropped token with
    every kept one.
    """

    layers: tuple[Natural, ...] | None = None
    keep: Keep = 0.5
    positions: Positions | None = None
    published_positions = "original"
    published_layers = (18,)
    published_depth = 28
    ranked_before = 1
    rounding = round

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Attention of the last prompt token, averaged over heads: (G, V)."""
        return tokens.signal("text_attention")[:, 0].mean(1)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep `count` tokens and fold the others into them."""
        index = super().reduce(tokens, count).index
        slot = most_similar(tokens.x, index)
        return Reduction(index, slot=slot, share=folded_shares(index, slot))


def most_similar(x: Tensor, index: Tensor) -> Tensor:
    """The survivor that is most like each token, by cosine.

    Args:
        x: (G, V, D) states.
        index: (G, K) positions of the survivors.

    Returns:
        (G, V) in [0, K); a survivor is its own.
    """
    unit = F.normalize(x.detach().float(), dim=-1)
    kept = unit.gather(1, index[..., None].expand(-1, -1, unit.shape[-1]))
    slot = highest(torch.matmul(unit, kept.mT), 1.0)
    number = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return slot.scatter(1, index, number)


def folded_shares(index: Tensor, slot: Tensor) -> Tensor:
    """What each token is worth after folding half and half, in order.

    Args:
        index: (G, K) positions of the survivors.
        slot: (G, V) the survivor that each token goes into.

    Returns:
        (G, V), one half to the power of the folds from the token's own to the last one of its
        survivor.
    """
    # A survivor comes first in its segment, then the others in order.
    own = torch.zeros_like(slot).scatter(1, index, 1)
    order = (2 * slot - own).argsort(dim=-1, stable=True)
    segment = slot.gather(1, order)
    end = torch.searchsorted(segment, segment, right=True)
    position = torch.arange(slot.shape[1], device=slot.device)
    folds = end - position - own.gather(1, order)
    return torch.exp2(-folds.float()).gather(1, order.argsort(dim=-1))
