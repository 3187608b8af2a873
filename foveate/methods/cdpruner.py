"""CDPruner: keep visual tokens that are relevant to the question and unlike each other.

Paper: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token
Pruning in MLLMs", arXiv:2506.10967. Reference code: Theia-4869/CDPruner @ 9541616.
Differs from the reference: any batch, several images and any encoder work; relevance is scaled
within each image, where the release scales over all crops of a call together (`as_released=True`
does so over all images of a prompt); one choice is made among all tokens of an image, where the
release makes one in each crop; once the kernel's rank is used up the most relevant tokens follow,
where the release runs into NaN; constant relevance leaves pure diversity.
By default relevance is that to the text after the image in the language model's own embedding
space. The release has no such form; this is our reading of how the paper carries over to models
without a text tower. `relevance="clip"` is the release's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import (
    Keep,
    Method,
    ModelFacts,
    Need,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)
from foveate.core.ranking import TIE
from foveate.ops.diversity import select_determinant, with_lengths
from foveate.ops.relevance import Relevance, relevance_needs, token_relevance

MAGNIFIED = 16.0
"""How much larger the rounding of cosines is once relevance is scaled to [0, 1] and squared, where
it spans an eighth or more."""


@register(
    "cdpruner",
    stage="pre_llm",
    does="relevant to question, yet diverse",
    needs=("question_embeddings",),
    paper="Zhang et al. 2025, arXiv:2506.10967",
)
@dataclass(frozen=True)
class CDPruner(Method):
    """Greedy choice by a determinantal point process, conditioned on the question.

    The kernel is r_i S_ij r_j, of cosines S of projected tokens and their relevance r in [0, 1].

    Args:
        keep: what survives; a count is the release's `visual_token_num`.
        relevance: `embeddings` compares visual tokens with the text after their image, both as the
            language model is given them; `clip` compares patches with the question in CLIP's
            space, see `foveate.ClipText`.
        negate: whether tokens that resemble the text LESS count as relevant. `None` does so for
            `clip`, as the release does (its author: a peculiarity of CLIP), and not for
            `embeddings`.
        positions: `None` gives survivors consecutive positions (`renumbered`), as the reference
            does, where positions are single numbers; `original` leaves them where they were.
        as_released: scale relevance over all images of a prompt together.

    Cost: one V x V product of the token features, O(V²·D), and O(K²·V) for the choice.
    """

    keep: Keep = 64
    relevance: Relevance = "embeddings"
    negate: bool | None = None
    positions: Positions | None = None
    as_released: bool = False

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector."""
        needs = relevance_needs(self.relevance, Need("clip_patches", (model.feature_layer,)))
        return (Step("pre_llm", needs=needs),)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep `count` tokens of each image, in raster order."""
        relevance = self.scaled_relevance(tokens)
        scale = 1.0 if self.as_released else MAGNIFIED
        order, gains = select_determinant(relevance_kernel(tokens.x, relevance), count, scale)
        of_picks = torch.where(gains > 0, torch.inf, relevance.gather(1, order))
        chosen = relevance.scatter(1, order, of_picks)
        return Reduction.top(chosen, count, scale)

    def scaled_relevance(self, tokens: VisualTokens) -> Tensor:
        """(G, V) relevance of each token, scaled to [0, 1]."""
        relevance, _ = token_relevance(tokens, self.relevance, "clip_patches")
        if (self.relevance == "clip") if self.negate is None else self.negate:
            relevance = -relevance
        low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
        if self.as_released:
            low, high = (
                _over_prompts(low, tokens.rows, "amin"),
                _over_prompts(high, tokens.rows, "amax"),
            )
        flat = high - low <= TIE  # rounding alone tells them apart
        scaled = (relevance - low + 1e-6) / (high - low).masked_fill(flat, 1)
        return torch.where(flat, 1.0, scaled)


def relevance_kernel(x: Tensor, relevance: Tensor) -> Tensor:
    """(G, V, V) kernel of (G, V, D) tokens and their (G, V) relevance."""
    x, length = with_lengths(x)
    weight = relevance[..., None].to(x) / length
    kernel = (x @ x.mT).mul_(weight).mul_(weight.mT)
    # A cosine to itself is 1, or rounding would decide between tokens of equal relevance.
    own = kernel.diagonal(dim1=1, dim2=2)
    own.copy_(torch.where(own == 0, own, relevance.to(own) ** 2))
    return kernel


def _over_prompts(values: Tensor, rows: tuple[int, ...], reduce: str) -> Tensor:
    """(G, 1) values brought together over the images of a row."""
    row = torch.tensor(rows, device=values.device)[:, None]
    together = values.new_zeros(max(rows) + 1, 1)
    together.scatter_reduce_(0, row, values, reduce, include_self=False)
    return together.gather(0, row)
