"""LRS-VQA: read a very large image from coarse to fine, where the question points.

Paper: Luo et al., "When Large Vision-Language Model Meets Large Remote Sensing Imagery:
Coarse-to-Fine Text-Guided Token Pruning", arXiv:2503.07588. Reference code: VisionXLab/LRS-VQA @
1b3b6cd.
Differs from the reference: levels are read until the next would need more than `tiles` tiles, as
the paper has it (theirs: always two); newlines are not ranked, do not call for tiles and stay only
in rows that keep a token (theirs: all stay, and call for the last tile of every row); a token calls
for the tile that its centre lies in (theirs: equal shares of the grid, padding included); coarse
levels are averages of the image (theirs: four of its pixels for each of theirs); partly covered
tokens stay (theirs: cut off, with rounding errors). `as_released=True` brings all of that back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core import (
    Keep,
    ModelFacts,
    Need,
    PerRequest,
    Positions,
    Scorer,
    Step,
    VisualTokens,
    register,
)
from foveate.core.budget import count as budget_count
from foveate.core.fields import Natural, Positive, Range
from foveate.core.ranking import highest, top
from foveate.core.schedule import ranked_at
from foveate.errors import BudgetError, FoveateError
from foveate.io.quoting import quoted

TEACHER = 14 / 32
"""Depth of the language model's layer whose attention the Region Focus Module learns to give."""
RELEASED_ROUNDS = 2


@register(
    "lrs-vqa",
    stage="llm",
    does="zooms into the relevant tiles",
    needs=("text_attention",),
    paper="Luo et al., ICCV 2025, arXiv:2503.07588",
)
@dataclass(frozen=True)
class LRSVQA(Scorer):
    """Keep the tokens that the last prompt token attends to, and look closer only there.

    `foveate.large.Reader` runs the whole method on images of any size: which tiles of a finer
    level are encoded at all is decided by a small module on the tokens of the coarser level. In a
    session the tiles are given already, and there is no module; tokens are then ranked by what the
    module is taught, the attention in a middle layer of the language model, before that layer.

    Args:
        keep: what survives of a level's tokens, newlines not counted (rounded down, at least one).
        tiles: most tiles that a finer level may need; where it needs more, reading stops.
        rounds: most levels after the thumbnail; `None` for all there are.
        threshold: instead of `keep`, keep what scores above this once the level's 5 % and 95 %
            quantiles are 0 and 1; large images only.
        shortest: pixels of the image's measured side at level 1; `None` takes three tiles.
        measured: which side that is: `long` as the released code, `short` as the paper.
        layer: in a session, the decoder layer before which tokens go; `None` takes the 14th of 32,
            scaled to the model.
        as_released: what the released code does where this is a defect; large images only.
        positions: `None` gives survivors consecutive positions, as published.

    Cost: of a level, the module's few decoder layers on its tokens; in a session one key
    projection and one query row.
    """

    keep: Keep = 0.25
    tiles: int = 40
    rounds: int | None = None
    threshold: Annotated[float, Range(0, 1, below=True)] | None = None
    shortest: Positive | None = None
    measured: Literal["long", "short"] = "long"
    layer: Natural | None = None
    as_released: bool = False
    positions: Positions | None = None

    def check_fields(self) -> None:
        """As in `Method`; `tiles` and `rounds` are positive.

        Raises:
            BudgetError: they are not.
            FoveateError: another field does not fit its annotation.
        """
        super().check_fields()
        if self.tiles < 1 or (self.rounds is not None and self.rounds < 1):
            raise BudgetError(
                f"tiles and rounds must be positive, got {self.tiles} and {self.rounds}"
            )

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One drop before the layer whose attention ranks.

        Raises:
            FoveateError: a setting that only large images have.
        """
        if self.threshold is not None or self.as_released:
            raise FoveateError(
                "threshold and as_released of lrs-vqa are for large images; read them with "
                "foveate.large.Reader, or leave these fields out in a session"
            )
        layer = self.layer
        if layer is None:
            layer = ranked_at(TEACHER * model.text_layers, model, self.slug)
        return (Step("llm", layer, (Need("text_attention", (layer,)),)),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Attention of the last prompt token among the image's own tokens, head mean: (G, V)."""
        return _among(tokens.signal("text_attention")[:, 0]).mean(1)

    def chosen(self, scores: Tensor, newline: Tensor) -> Tensor:
        """Which tokens of a level survive.

        Args:
            scores: (N,) of the module.
            newline: (N,) which tokens end a row; every row has one, or none has.

        Returns:
            (K,) ascending positions: the best tokens and the newlines that end their rows. By the
            released rule newlines are ranked like others, and all stay unless a threshold is given.

        Raises:
            BudgetError: `keep` is given for each request, but there is one image.
        """
        ranked = torch.arange(len(scores), device=scores.device)
        if not self.as_released:
            ranked = ranked[~newline]
        kept = ranked[self._best(scores[ranked])]
        ends = torch.where(newline)[0]
        if not self.as_released and len(ends):
            ends = ends[torch.searchsorted(ends, kept)]  # those of the rows that stay
        elif self.threshold is not None:
            ends = ends[:0]
        return torch.cat((kept, ends)).unique()

    def _best(self, scores: Tensor) -> Tensor:
        """(K,) positions that the rule keeps of (N,) scores, in any order."""
        if self.threshold is not None:
            rated = stretched(scores)
            above = rated > self.threshold
            return torch.where(above)[0] if bool(above.any()) else highest(rated)[None]
        if isinstance(self.keep, PerRequest | tuple):
            raise BudgetError(f"a large image takes one keep, got {quoted(self.keep)}")
        rounding = type(self).rounding
        count = budget_count(self.keep, len(scores), step=0, row=0, rounding=rounding)
        return top(scores, count)


def stretched(scores: Tensor) -> Tensor:
    """(N,) scores between their 5 % and 95 % quantiles, as 0 to 1."""
    low, high = scores.float().quantile(torch.tensor([0.05, 0.95], device=scores.device))
    return ((scores - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def _among(attention: Tensor) -> Tensor:
    """(G, H, V) attention, as shares of what each head gives to these V tokens."""
    total = attention.sum(-1, keepdim=True)
    return attention / total.clamp(min=torch.finfo(attention.dtype).tiny)
