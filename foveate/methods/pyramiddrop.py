"""PyramidDrop: drop part of the visual tokens at the end of each stage of the language model.

Paper: Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
Redundancy Reduction", arXiv:2410.17247, section 3. Reference code: Cooperx521/PyramidDrop @
6444f30, for inference and for training.
Differs from the reference: any batch, several images, grouped-query attention and padding work
(there they do not); each image has its own budget; at least one token of an image survives; no
truncation to the tokenizer's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.core import Keep, Positions, Scheduled, Scorer, VisualTokens, register
from foveate.core.fields import Natural


@register(
    "pyramiddrop",
    stage="llm",
    does="drops by attention, in stages",
    needs=("text_attention",),
    paper="Xing et al. 2024, arXiv:2410.17247",
)
@dataclass(frozen=True)
class PyramidDrop(Scheduled, Scorer):
    """Rank visual tokens by the attention of the last prompt token, stage by stage.

    Args:
        layers: decoder layers before which tokens are dropped, ascending. `None` divides the model
            at hand into equal stages, which is the published (8, 16, 24) on 32 layers; where a
            layer sees only a window of the sequence, the nearest one that sees all takes its place.
        keep: what survives each drop, as a share of the ORIGINAL count of each image (paper:
            lambda = 0.5 to the power of the stage), or a count. Shares are truncated, as in the
            reference. One number is the mean over the layers from the first drop on.
        positions: `None` gives survivors consecutive positions (`renumbered`) after every drop, as
            the reference does, where positions are single numbers; `original` leaves them where
            they were.

    Cost: one key projection of all tokens and one query row per drop; no attention map.
    """

    layers: tuple[Natural, ...] | None = None
    keep: Keep = (0.5, 0.25, 0.125)
    positions: Positions | None = None
    rounding = math.trunc
    published_layers: ClassVar[tuple[int, ...]] = (8, 16, 24)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Attention of the query tokens, averaged over heads: (G, V)."""
        return tokens.signal("text_attention")[:, 0].mean(1)
