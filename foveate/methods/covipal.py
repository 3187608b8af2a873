"""CoViPAL: a plug-in that learns from a deep layer's attention which visual tokens to keep.

Paper: Tang et al., "CoViPAL: Layer-wise Contextualized Visual Token Pruning for Large
Vision-Language Models", arXiv:2508.17243 (Findings of EMNLP 2025). The code that the paper names
could not be had, so what is here is our reading of its abstract: the size of the plug-in, how the
text conditions it, the guide layer, and how the second stage lets gradients through the choice,
which are VisionSelector's gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveate.core import (
    Keep,
    Learning,
    ModelFacts,
    Need,
    Positions,
    Reduction,
    Scorer,
    Step,
    TrainingPass,
    VisualTokens,
    register,
)
from foveate.core.fields import Natural, Positive
from foveate.core.learning import gated, soft_top
from foveate.core.schedule import ranked_at
from foveate.ops.learning import flops_of, untrained


class PlugIn(nn.Module):
    """A score for each visual token, from the token, its image and the text.

    Args:
        width: D, of tokens.
        inner: of the hidden layer.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.token, self.image, self.text = (nn.Linear(width, inner) for _ in range(3))
        self.score = nn.Linear(inner, 1, bias=False)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """(G, V) scores of (G, V, D) tokens and (G, D) means of their text."""
        x = self.norm(x.to(self.norm.weight.dtype))
        of_all = self.image(x.mean(1)) + self.text(self.norm(text.to(x)))
        return self.score(nn.functional.gelu(self.token(x) + of_all[:, None]))[..., 0]


@register(
    "covipal",
    stage="pre_llm",
    does="learns what deep layers read",
    needs=("question_embeddings", "text_attention"),
    paper="Tang et al. 2025, arXiv:2508.17243",
)
@dataclass(frozen=True)
class CoViPAL(Learning, Scorer):
    """Keep the tokens that a trained plug-in scores highest.

    It is trained with the model frozen, `prepare(model, method, train="method")`, in two stages.

    Args:
        keep: what survives.
        stage_of_training: `attention` keeps all tokens and teaches the plug-in what the guide layer
            attends to; `end_to_end` gates all tokens, so that the model's own loss teaches it.
        guide: decoder layer whose attention is learned, that of the query tokens; `None` for the
            one nearest to two thirds of the depth.
        inner: width of the plug-in.
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` leaves them where they were.

    Cost: one projection of the tokens, 2 V D `inner`.
    """

    keep: Keep = 0.25
    stage_of_training: Literal["attention", "end_to_end"] = "attention"
    guide: Natural | None = None
    inner: Positive = 256
    positions: Positions | None = None
    note = "covipal ranks by a plug-in that is to be trained (foveate.prepare)"

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector; in training a look at the guide layer."""
        reduce = Step("pre_llm", needs=(Need("question_embeddings"),))
        if self.stage_of_training == "end_to_end":
            return (reduce,)
        wanted = 2 * model.text_layers / 3
        guide = ranked_at(wanted, model, self.slug) if self.guide is None else self.guide
        needs = (Need("text_attention", (guide,)),)
        return (reduce, Step("llm", guide, needs, effects=("training",)))

    def learned(self, model: ModelFacts) -> PlugIn:
        """The plug-in."""
        return untrained(lambda: PlugIn(model.text_width, self.inner))

    def learned_flops(
        self, model: ModelFacts, step: Step, tokens: int, grid: tuple[int, int]
    ) -> int:
        """What the plug-in costs, counted on the meta device."""
        if step.stage != "pre_llm":
            return 0
        learned = self.learned(model).to("meta")
        x = torch.empty(1, tokens, model.text_width, device="meta")
        return flops_of(lambda: learned(x, x[:, 0]))

    def scores(self, tokens: VisualTokens) -> Tensor:
        """(G, V) scores of the plug-in."""
        learned: Any = tokens.learned
        words, mask = tokens.signal("question_embeddings"), tokens.signal("question_mask")
        mask = mask[..., None].to(words)
        text = (words * mask).sum(1) / mask.sum(1).clamp(min=1)
        return learned(tokens.x, text)

    def reduce_softly(
        self, tokens: VisualTokens, count: int, training: TrainingPass
    ) -> Reduction | None:
        """Score all tokens; and learn, at the guide layer or by gates."""
        every = torch.arange(tokens.count, device=tokens.index.device).expand_as(tokens.index)
        if self.stage_of_training == "end_to_end":
            if not 0 < count < tokens.count:
                return None
            return gated(tokens, soft_top(self.scores(tokens).float(), count))
        if tokens.number == 0:
            return Reduction(every, label=self.scores(tokens).float())
        assert tokens.label is not None  # the scores of the step before
        attention = tokens.signal("text_attention")[:, 0].mean(1).float()
        wanted = attention / attention.sum(1, keepdim=True)
        loss = -(wanted * tokens.label.log_softmax(1)).sum(1)
        training.add(self.slug, loss)
        return None
