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

import math
from dataclasses import dataclass

import torch.nn.functional as F

from foveate.core import (
    Keep,
    Method,
    ModelFacts,
    Need,
    PerRequest,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)
from foveate.core.budget import check_keep
from foveate.core.budget import count as budget_count
from foveate.core.fields import Natural, Positive
from foveate.errors import BudgetError, FoveateError
from foveate.io.quoting import quoted
from foveate.ops.matching import match, match_every


@dataclass(frozen=True)
class Merge(Step):
    """A step of ToMe.

    Args:
        r: patches to merge.
        part: (number of the layer from 1, layers in all), for an equal share of `keep`.
    """

    r: int = 0
    part: tuple[int, int] = (1, 1)


@register(
    "tome", stage="vision", needs=("encoder_keys",), paper="Bolya et al. 2023, arXiv:2210.09461"
)
@dataclass(frozen=True)
class ToMe(Method):
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

    def check_budget(self, steps: int | None) -> None:
        """`keep` speaks about the end of all steps, so it is one share or count.

        Raises:
            BudgetError: it is out of range, or a schedule.
        """
        if isinstance(self.keep, tuple | PerRequest):
            raise BudgetError(f"tome takes one share or count as keep, got {quoted(self.keep)}")
        if self.keep is not None:
            check_keep(self.keep, 1)

    def schedule(self, layers: int) -> tuple[int, ...]:
        """Tokens to remove in each of some layers."""
        if isinstance(self.r, tuple):
            return (self.r + (0,) * layers)[:layers]
        low = int(self.r * (1 - self.inflect))
        slope = (2 * self.r - 2 * low) / max(layers - 1, 1)
        return tuple(int(low + slope * layer) for layer in range(layers))

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """A merge within each layer that is read, where the schedule asks for one."""
        read = model.feature_layer + 1
        schedule = self.schedule(model.vision_layers)[:read]
        return tuple(
            Merge(
                "vision",
                i,
                (Need("encoder_keys", (i,)),),
                inside=True,
                effects=("proportional",) if self.prop_attn else (),
                r=r,
                part=(i + 1, read),
            )
            for i, r in enumerate(schedule)
            if r or self.keep is not None
        )

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """What is left after r merges, at most half of the tokens.

        Raises:
            BudgetError: `keep` asks for more than half in one layer.
        """
        assert isinstance(step, Merge)
        if self.every is not None:
            return remaining // self.every or remaining
        if self.keep is None:
            return remaining - min(step.r, remaining // 2)
        dropped = total - budget_count(
            self.keep, total, step=0, row=row, rounding=type(self).rounding
        )
        layer, layers = step.part
        wanted = total - dropped * layer // layers
        if remaining - wanted > remaining // 2:
            raise BudgetError(
                f"tome merges at most half of the tokens in a layer; keep={self.keep} of {total} "
                f"tokens needs {remaining - wanted} of {remaining} in layer {step.layer}. Keep at "
                f"least {math.ceil(total / (layers + 1)) + 1}, or give r a schedule"
            )
        return wanted

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Merge patches until `count` are left of each image, weighted by their sizes."""
        keys = F.normalize(tokens.signal("encoder_keys")[:, 0].mean(1), dim=-1)
        if self.every is not None:
            index, slot = match_every(keys, self.every)
        else:
            index, slot = match(keys, tokens.count - count, tokens.special)
        return Reduction.mean(index, slot, tokens.sizes)
