"""FlowCut: drop patches bit by bit while the encoder runs, by how information flows.

Paper: Tong et al., "FlowCut: Rethinking Redundancy via Information Flow for Efficient
Vision-Language Models", arXiv:2505.19536 (NeurIPS 2025). Reference code: TungChintao/FlowCut @
a2ecd24, the path for CLIP; where it and the paper differ (the semantic cue), the code is followed.
Differs from the reference: any depth of encoder and any attention kernel work; entropy is taken in
float32 and of 0 log 0 as 0 (there: NaN, which ends the run); each image has a schedule of its own
(there: images that are encoded together share one). The second cut, inside the language model,
which the release makes for LLaVA-NeXT and Qwen2-VL, is the method `flowcut-inner`. The release's
path for encoders without a class token is not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

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
from foveate.core.budget import count as budget_count
from foveate.core.fields import Positive, Range
from foveate.core.ranking import ranked
from foveate.errors import BudgetError, LayerError
from foveate.io.quoting import quoted


@dataclass(frozen=True)
class Cut(Step):
    """A step of FlowCut.

    Args:
        remaining: encoder layers from here to the end of pruning.
    """

    remaining: int = 0


@register(
    "flowcut",
    stage="vision",
    does="gradual drops by information flow",
    needs=("information_flow", "cls_attention"),
    paper="Tong et al. 2025, arXiv:2505.19536",
)
@dataclass(frozen=True)
class FlowCut(Method):
    """Drop patches before every second encoder layer, more where attention is concentrated.

    Scores are smoothed over all layers so far. Just before the layer that the language model sees,
    what is left above the budget goes.

    Args:
        keep: what survives the last drop, a share or a count (the release's `target_num`).
        every: drop before every such layer, counted back from the last drop.
        momentum: weight of the scores so far against those of the newest layer, in [0, 1).
        as_released: let images that are encoded together lose the same number at each step, that of
            the image which loses most, so that what an image keeps depends on the others.
        positions: of the survivors in a language model; `None` makes them consecutive
            (`renumbered`), as the reference does, where positions are single numbers; `original`
            leaves them.

    Cost: in each layer before the last drop one row of attention and one of value products.
    """

    keep: Keep = 128
    every: Positive = 2
    momentum: Annotated[float, Range(0, 1, below=True)] = 0.5
    as_released: bool = False
    positions: Positions | None = None
    field_errors = {"momentum": LayerError, "every": LayerError}  # noqa: RUF012
    adaptive = True  # before the last drop, attention decides how many go
    rounding = math.floor

    def check_budget(self, steps: int | None) -> None:
        """`keep` speaks about the end of all steps, so it is one share or count.

        Raises:
            BudgetError: it is out of range, or a schedule.
        """
        if isinstance(self.keep, tuple | PerRequest):
            raise BudgetError(f"flowcut takes one share or count as keep, got {quoted(self.keep)}")
        super().check_budget(1)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """Drops before layers at regular distances from the one that the language model sees.

        Raises:
            LayerError: there is no layer before that one.
        """
        last = model.feature_layer
        if last < 1:
            raise LayerError(
                "flowcut drops tokens between encoder layers, but the language model sees the "
                f"output of layer {last} of {model.vision_layers}"
            )
        return tuple(
            Cut(
                "vision",
                layer,
                (
                    Need("information_flow", tuple(range(layer))),
                    Need("cls_attention", (layer - 1,)),
                ),
                remaining=last - layer,
                effects=("ragged",) if not self.as_released and layer < last else (),
            )
            for layer in range(1, last + 1)
            if (last - layer) % self.every == 0
        )

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """What survives at least: the budget."""
        rounding = type(self).rounding
        return min(budget_count(self.keep, total, step=0, row=row, rounding=rounding), remaining)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Drop the patches that told least, down to `count` at the last step."""
        assert isinstance(tokens.step, Cut)
        scores = self.scores(tokens)
        if tokens.valid is not None:
            scores = scores.masked_fill(~tokens.valid, -torch.inf)
        if not tokens.step.remaining:
            return Reduction.top(scores, count)
        counts = self._counts(tokens, count)
        told = counts.tolist()
        most, least = max(told), min(told)
        if self.as_released or most == least:
            return Reduction.top(scores, least)
        index, order = ranked(scores)[:, :most].sort(dim=-1)
        return Reduction(index, valid=order < counts[:, None])

    def _counts(self, tokens: VisualTokens, count: int) -> Tensor:
        """(G) tokens left of each image, at least `count`."""
        assert isinstance(tokens.step, Cut)
        attention = tokens.signal("cls_attention")[:, 0].float().mean(1)
        remaining = torch.full_like(attention[:, 0], tokens.count)
        if tokens.valid is not None:
            remaining = tokens.valid.sum(1).float()
        spare = (remaining - count) / math.sqrt(tokens.step.remaining)
        dropped = torch.round(spare * concentration(attention, remaining))
        return (remaining - dropped).long().clamp(min=count)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Information flow of all layers so far, smoothed with `momentum`: (G, V)."""
        flow = tokens.signal("information_flow")
        weights = self.momentum ** torch.arange(flow.shape[1] - 1, -1, -1, device=flow.device)
        weights[1:] *= 1 - self.momentum
        return torch.einsum("l,glv->gv", weights.to(flow.dtype), flow)


def concentration(attention: Tensor, remaining: Tensor) -> Tensor:
    """(G) 1 - (entropy of attention / that of even attention) squared.

    Args:
        attention: (G, V) attention of the class token; only its shares count.
        remaining: (G) how many of the V tokens there are; the others get none.
    """
    shares = attention / attention.sum(-1, keepdim=True).clamp(min=torch.finfo().tiny)
    entropy = torch.special.entr(shares).sum(-1) / remaining.clamp(min=2).log()
    return 1 - entropy.square()
