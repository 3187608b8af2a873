"""FlowCut, inside the language model: one more cut, by how information flows to the prompt's end.

Paper: Tong et al., "FlowCut: Rethinking Redundancy via Information Flow for Efficient
Vision-Language Models", arXiv:2505.19536 (NeurIPS 2025). Reference code: TungChintao/FlowCut @
a2ecd24, its path for LLaVA-NeXT; that for Qwen2-VL ranks alike. The part inside the encoder is the
method `flowcut`; combine them as `[FlowCut(...), FlowCutInner(...)]`.
Differs from the reference: any batch and several images work, each with a budget and shares of its
own (there: one budget for all visual tokens of one sample); newlines of tiled images are tokens
like others (there: there are none).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import Keep, Positions, Scheduled, Scorer, VisualTokens, register
from foveate.core.fields import Natural


@register(
    "flowcut-inner",
    stage="llm",
    does="one later cut for FlowCut",
    needs=("text_attention", "value_attention", "llm_values"),
    paper="Tong et al. 2025, arXiv:2505.19536",
)
@dataclass(frozen=True)
class FlowCutInner(Scheduled, Scorer):
    """Keep the tokens that tell the last prompt token most: by its attention and by likeness of
    values, times the size of a token's value.

    Args:
        layers: decoder layers before which tokens are dropped, from 1; the layer before ranks.
            `None` scales the published 2 of 32 layers to the model at hand.
        keep: what survives each drop; shares are of the original count. Published are 33.3, 22.2
            and 11.1 % where the encoder leaves twice as many.
        positions: `None` makes survivors consecutive (`renumbered`), as the reference does, where
            positions are single numbers; `original` leaves them.

    Cost: key and value projections of all tokens, one query row, one row of value products.
    """

    layers: tuple[Natural, ...] | None = None
    keep: Keep = 0.222
    positions: Positions | None = None
    published_layers = (2,)
    ranked_before = 1

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Shares of attention and of likeness, times the L1 size of the mean value: (G, V)."""
        attention = tokens.signal("text_attention")[:, 0]
        total = attention.sum(-1, keepdim=True).clamp(min=torch.finfo(attention.dtype).tiny)
        likeness = tokens.signal("value_attention")[:, 0].mean(1)
        size = tokens.signal("llm_values")[:, 0].float().mean(1).abs().sum(-1)
        return ((attention / total).mean(1) + likeness) * size
