"""ToMe: in every encoder layer, merge the r pairs of tokens that are most alike.

Paper: Bolya et al., "Token Merging: Your ViT But Faster", arXiv:2210.09461 (ICLR 2023). Reference
code: facebookresearch/ToMe @ af95e4b; nothing of it is copied.
Differs from the reference: `keep` may set the schedule; in a vision-language model only the layers
that the language model reads merge; a head that averages or attends to all tokens sees a merged
token as often as it has sources (there: only MAE's head does); registers count as special tokens
(there: unknown); bringing tokens back knows that the distillation token has moved (there: rows
come back shifted). `inflect` is the second entry of the release's pair (r, inflect).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from foveate.core import (
    Keep,
    ModelFacts,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)
from foveate.core.fields import Natural, Positive
from foveate.core.layerwise import Layerwise
from foveate.core.step import Effect
from foveate.errors import FoveateError
from foveate.io.quoting import quoted
from foveate.ops.matching import match, match_every


@register(
    "tome",
    stage="vision",
    does="merges the most similar pairs",
    needs=("encoder_keys",),
    paper="Bolya et al. 2023, arXiv:2210.09461",
)
@dataclass(frozen=True)
class ToMe(Layerwise):
    """Merge similar patches between the attention and the MLP of every layer.

    A layer can merge at most half of its patches; more are clipped, as in the release.

    Args:
        r: patches removed in each layer, or one number for each layer from the first (0 after).
        inflect: in [-1, 1], tilts an integer `r` over the layers: -1 goes from 2r down to 0.
        prop_attn: count a merged token as often as it has sources in attention; the release turns
            this off for MAE models.
        keep: what survives the last layer, a share or a count, by equal r in all layers; `None`
            uses `r`.
        every: merge all patches into every such one instead (the release's kth matching), in the
            layers in which `r` is not 0.
        positions: of the survivors in a language model; `None` makes them consecutive
            (`renumbered`) where positions are single numbers, `original` leaves them.

    Cost: one half-by-half product of head-averaged keys in each layer, under 1 % of the layer.
    """

    r: Natural | tuple[Natural, ...] = 8
    inflect: float = 0.0
    prop_attn: bool = True
    keep: Keep | None = None
    every: Positive | None = None
    positions: Positions | None = None
    limit = "half of the tokens"

    def check_fields(self) -> None:
        """As in `Method`; `inflect` is in [-1, 1].

        Raises:
            FoveateError: a field does not fit.
        """
        super().check_fields()
        if not -1 <= self.inflect <= 1:
            raise FoveateError(
                "r must be a number of tokens >= 0 or a tuple of those, and inflect in [-1, 1]; "
                f"got r={quoted(self.r)}, inflect={self.inflect} (the release's pair (r, inflect) "
                "is r=..., inflect=...)"
            )

    def schedule(self, layers: int) -> tuple[int, ...]:
        """As in `Layerwise`, tilted by `inflect`."""
        if isinstance(self.r, tuple):
            return super().schedule(layers)
        low = int(self.r * (1 - self.inflect))
        slope = (2 * self.r - 2 * low) / max(layers - 1, 1)
        return tuple(int(low + slope * layer) for layer in range(layers))

    def most(self, remaining: int) -> int:
        """Half of the tokens."""
        return remaining // 2

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """A merge within each layer that is read, where the schedule asks for one."""
        effects: tuple[Effect, ...] = ("proportional",) if self.prop_attn else ()
        return self.layer_steps(model, ("encoder_keys",), effects)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """As in `Layerwise`, unless `every` decides."""
        if self.every is not None:
            return remaining // self.every or remaining
        return super().count(remaining, total, step, number, row)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Merge patches until `count` are left of each image, weighted by their sizes."""
        keys = F.normalize(tokens.signal("encoder_keys")[:, 0].mean(1), dim=-1)
        if self.every is not None:
            index, slot = match_every(keys, self.every)
        else:
            index, slot = match(keys, tokens.count - count, tokens.special)
        return Reduction.mean(index, slot, tokens.sizes)
