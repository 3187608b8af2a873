"""VisionSelector: a small scorer, trained through the frozen model, that picks visual tokens.

Paper: Zhu et al., "VisionSelector: End-to-End Learnable Visual Token Compression for Efficient
Multimodal LLMs", arXiv:2510.16598. Reference code: JulietChoo/VisionSelector.
Differs from the reference: any batch and several images work; the mean over all tokens is taken of
the second projection, which gives the same scores without a V x V product; the weight of the
method's own loss rises with the scorer's own count of training forwards, not the trainer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.core import (
    Keep,
    Learning,
    ModelFacts,
    Positions,
    Reduction,
    Scorer,
    Step,
    TrainingPass,
    VisualTokens,
    register,
)
from foveate.core.fields import Natural, Positive, Range
from foveate.core.learning import gated, soft_top
from foveate.core.ranking import top
from foveate.ops.learning import flops_of, untrained


class TokenScorer(nn.Module):
    """How much each token of an image agrees with all of them, in a learned space.

    Args:
        width: D, of tokens.
        inner: of the space.
    """

    steps: Tensor

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.query, self.key = (nn.Linear(width, inner, bias=False) for _ in range(2))
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=1e-4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """(G, V) scores of (G, V, D) tokens."""
        x = x.to(self.query.weight.dtype)
        key = self.key(x.mean(1, keepdim=True))  # the mean of keys, as projections are linear
        return (self.query(x) * key).sum(-1) / key.shape[-1] ** 0.5


@register(
    "visionselector",
    stage="pre_llm",
    does="keeps what a scorer prefers",
    paper="Zhu et al. 2025, arXiv:2510.16598",
)
@dataclass(frozen=True)
class VisionSelector(Learning, Scorer):
    """Keep the tokens that a trained scorer ranks highest.

    In training all tokens stay, each times its gate; gates of an image sum to its budget. Besides
    the model's loss they are drawn towards 0 and 1 by their cross-entropy with the choice itself,
    which counts more and more. Train the scorer alone: `prepare(model, method, train="method")`.

    Args:
        keep: what survives.
        inner: width of the scorer.
        weight: what the cross-entropy counts at the beginning and at the end.
        ramp: training forwards in which the weight rises.
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` leaves them where they were.

    Cost: two projections of the tokens, 2 V D `inner`, and a product.
    """

    keep: Keep = 0.2
    inner: Positive = 1792
    weight: tuple[Annotated[float, Range(0)], Annotated[float, Range(0)]] = (0.1, 3.0)
    ramp: Natural = 1000
    positions: Positions | None = None
    note = "visionselector ranks by a scorer that is to be trained (foveate.prepare)"

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector; it needs nothing but the features."""
        return (Step("pre_llm"),)

    def learned(self, model: ModelFacts) -> TokenScorer:
        """The scorer."""
        return untrained(lambda: TokenScorer(model.text_width, self.inner))

    def learned_flops(
        self, model: ModelFacts, step: Step, tokens: int, grid: tuple[int, int]
    ) -> int:
        """What the scorer costs, counted on the meta device."""
        learned = self.learned(model).to("meta")
        return flops_of(lambda: learned(torch.empty(1, tokens, model.text_width, device="meta")))

    def scores(self, tokens: VisualTokens) -> Tensor:
        """(G, V) scores of the scorer."""
        learned: Any = tokens.learned
        return learned(tokens.x)

    def reduce_softly(
        self, tokens: VisualTokens, count: int, training: TrainingPass
    ) -> Reduction | None:
        """Gate all tokens, and add the cross-entropy of the gates."""
        if not 0 < count < tokens.count:
            return None
        learned: Any = tokens.learned
        scores = self.scores(tokens).float()
        gates = soft_top(scores, count)
        chosen = torch.zeros_like(gates).scatter(1, top(scores.detach(), count), 1.0)
        share = (learned.steps / max(1, self.ramp)).clamp(max=1.0)
        first, last = self.weight
        if self.slug not in training.memory:  # once a forward, of however many images
            learned.steps += 1
        loss = F.binary_cross_entropy(gates, chosen, reduction="none").mean(1)
        training.add(self.slug, (first + share * (last - first)) * loss)
        return gated(tokens, gates)
