"""Token Transforming: before some encoder layers, mix all tokens into a few, many to many.

Paper: Zeng et al., "Token Transforming: A Unified and Training-Free Token Compression Framework for
Vision Transformer Acceleration", arXiv:2506.05709. There is no public code, and only its form
Y = W X with a dense W is certain; all else is our reading: survivors stand at the tokens that get
most attention; each token is shared among them by a softmax of cosines, and each survivor is the
mean of its shares; a survivor counts in attention as often as it has shares; layers and shares are
those at which the published saving of 40 % is met on DeiT-S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from foveate.core import (
    Keep,
    ModelFacts,
    Need,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)
from foveate.core.encoder_schedule import EncoderScheduled
from foveate.core.fields import Natural, Range
from foveate.core.ranking import top
from foveate.core.schedule import Drop
from foveate.core.step import Effect


@register(
    "token-transforming",
    stage="vision",
    does="mixes all tokens into few",
    paper="Zeng et al. 2025, arXiv:2506.05709",
)
@dataclass(frozen=True)
class TokenTransforming(EncoderScheduled):
    """Make each survivor a mean of all tokens, most of those most like it.

    Args:
        layers: encoder layers before which tokens are mixed, ascending, from 1 on; `None` scales 3,
            6 and 9 of 12 to the encoder.
        keep: what survives each time, as a share of the ORIGINAL count of each image, or a count.
        temperature: how evenly a token is shared among survivors; cosines are divided by it.
        prop_attn: count a survivor as often as it has shares in attention.
        positions: of the survivors in a language model; `None` makes them consecutive
            (`renumbered`) where positions are single numbers, `original` leaves them.

    Cost: a row of attention, and two products of K x V by the width, each time; with no class token
    the attention of all queries, never held together.
    """

    layers: tuple[Natural, ...] | None = None
    keep: Keep = (0.7, 0.46, 0.27)
    temperature: Annotated[float, Range(0, above=True)] = 0.01
    prop_attn: bool = False
    positions: Positions | None = None
    rounding = round
    published_layers = (3, 6, 9)
    first_layer = 1

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """A step before each of the layers, by the attention of the layer before."""
        signal = "cls_attention" if model.class_token else "received_attention"
        effects: tuple[Effect, ...] = ("proportional",) if self.prop_attn else ()
        return tuple(
            Drop("vision", layer, (Need(signal, (layer - 1,)),), effects=effects, entry=entry)
            for layer, entry in self.drops(model)
        )

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Share every token among the `count` that get most attention."""
        index = top(self.attention(tokens), count)
        x = F.normalize(tokens.x.float(), dim=-1)
        anchors = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        shares = (anchors @ x.transpose(1, 2) / self.temperature).softmax(1) * tokens.sizes[:, None]
        return Reduction(index, shares / shares.sum(-1, keepdim=True))

    def attention(self, tokens: VisualTokens) -> Tensor:
        """(G, V) attention that tokens get: of the class token, or of all where there is none."""
        if "cls_attention" in tokens.signals:
            return tokens.signal("cls_attention")[:, 0].float().mean(1)
        return tokens.signal("received_attention")[:, 0].float()
