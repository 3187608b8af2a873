"""DART: keep the visual tokens that repeat a few pivot tokens least.

Paper: Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication
Matters More", arXiv:2502.11494. Reference code: ZichenWen1/DART @ 5a19452, read from a public fork.
Differs from the reference: any batch, several images, padding and grouped-query attention work;
exactly `keep` tokens survive, where the release rounds down to whole quotas and then adds the image
pivots; pivots choose in the order of their strength, image before text, where the release visits
them in the order of a hash table of their positions, which changes with the length of the text in
front; the tokens that a short question or a small budget leaves to choose from may be fewer than
the published pivots and quotas ask for. `as_released=True` goes back to the release's count and
order.
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
from foveate.core.fields import Natural, Positive
from foveate.core.ranking import among_top, ranked
from foveate.core.reduction import take_rows
from foveate.core.schedule import keyed_before
from foveate.ops.diversity import normalize, with_lengths

PUBLISHED_LAYER, PUBLISHED_DEPTH = 2, 32


@register(
    "dart",
    stage="llm",
    does="keeps what duplicates pivots least",
    needs=("llm_keys", "question_keys", "normed_states", "question_normed_states"),
    paper="Wen et al. 2025, arXiv:2502.11494",
)
@dataclass(frozen=True)
class DART(Method):
    """Keep pivots, and for each pivot the visual tokens that are least similar to it.

    Pivots are the visual tokens, and the text tokens after the image, whose keys have the largest
    L1 norm. Every pivot in turn takes its share of the visual tokens that are left, those with the
    lowest cosine to it under the language model's final norm.

    Args:
        layer: K of the paper: tokens are dropped before this layer, keys are those of the layer
            before it. `None` is the published 2 of 32 layers, scaled to the model at hand.
        keep: what survives, image pivots included; shares are truncated (paper: one minus its
            reduction ratio of 0.667, 0.778 or 0.889).
        image_pivots: pivots among the visual tokens, at least 1.
        text_pivots: pivots among the text tokens after the image.
        positions: `None` leaves survivors at their positions (`original`), as the reference does;
            `renumbered` makes them consecutive.
        as_released: count and visit pivots as the release does; see the module.

    Cost: one key projection of all tokens, one product of the pivots with the V visual tokens; no
    attention map.
    """

    layer: Positive | None = None
    keep: Keep = 0.222
    image_pivots: Positive = 4
    text_pivots: Natural = 4
    positions: Positions | None = None
    as_released: bool = False
    published_positions = "original"

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One drop before `layer`."""
        layer = self.layer
        if layer is None:
            scaled = round(model.text_layers * PUBLISHED_LAYER / PUBLISHED_DEPTH)
            layer = keyed_before(scaled, model, self.slug)
        needs = [
            Need("llm_keys", (layer - 1,)),
            Need("question_keys", (layer - 1,)),
            Need("normed_states", (layer,)),
            Need("question_normed_states", (layer,)),
        ]
        if self.as_released:
            needs += [Need("prompt_positions"), Need("question_positions")]
        return (Step("llm", layer, tuple(needs)),)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """`keep`; as released, the image pivots and a whole quota for each of all pivots."""
        budget = super().count(remaining, total, step, number, row)
        if not self.as_released:
            return budget
        pivots = self.image_pivots + self.text_pivots
        return min(self.image_pivots + budget // pivots * pivots, remaining)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep `count` tokens of each image, in raster order."""
        own = min(self.image_pivots, count)
        strength = _strength(tokens.signal("llm_keys"))
        pivots = ranked(strength)[:, :own]
        words, real_words = self._text_pivots(tokens)
        x, lengths = with_lengths(tokens.signal("normed_states")[:, 0])
        text = take_rows(tokens.signal("question_normed_states")[:, 0], words)
        both = normalize(torch.cat((take_rows(x, pivots), text.to(x)), 1))
        similarity = (both @ x.mT) / lengths.mT
        real = torch.cat((torch.ones_like(pivots, dtype=torch.bool), real_words), 1)
        if self.as_released:
            order = _hash_order(tokens, pivots, words, real)
            similarity, real = take_rows(similarity, order), real.gather(1, order)
        taken = torch.zeros_like(tokens.index, dtype=torch.bool).scatter(1, pivots, True)
        _take_unlike(taken, similarity, _shares(count - own, real), -(-(count - own) // own))
        index = taken.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        return Reduction(index[:, :count])

    def _text_pivots(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """(G, P) which of the text tokens are pivots, and which of those are no padding."""
        mask = tokens.signal("question_mask")
        strength = _strength(tokens.signal("question_keys")).masked_fill(~mask, -torch.inf)
        index = ranked(strength)[:, : self.text_pivots]
        return index, mask.gather(1, index)


def _strength(keys: Tensor) -> Tensor:
    """(G, N) L1 norm over heads and channels, of (G, 1, H, N, d)."""
    return keys[:, 0].float().abs().sum((1, 3))


def _shares(picks: int, real: Tensor) -> Tensor:
    """(G, P) how many of the picks each pivot makes: equally many, the first ones one more."""
    pivots = real.sum(1, keepdim=True)
    nth = real.cumsum(1) - 1
    return torch.where(real, picks // pivots + (nth < picks % pivots), 0)


def _take_unlike(taken: Tensor, similarity: Tensor, quota: Tensor, most: int) -> None:
    """Let every pivot in turn take the tokens least similar to it that nobody has taken.

    Args:
        taken: (G, V) tokens that are taken, updated.
        similarity: (G, P, V) of pivots to tokens.
        quota: (G, P) how many each takes; together no more than are left.
        most: a bound of all quotas.
    """
    most = min(most, taken.shape[1])
    for pivot in range(quota.shape[1] if most else 0):
        unlike = (-similarity[:, pivot]).masked_fill(taken, -torch.inf)
        taken |= among_top(unlike, quota[:, pivot, None], most, scale=1.0)


def _hash_order(tokens: VisualTokens, pivots: Tensor, words: Tensor, real: Tensor) -> Tensor:
    """(G, P) the order in which Python iterates over a set of the pivots' prompt positions."""
    image = tokens.signal("prompt_positions").gather(1, pivots)
    positions = torch.cat((image, tokens.signal("question_positions").gather(1, words)), 1)
    orders = []
    for row, mask in zip(positions.tolist(), real.tolist(), strict=True):
        there = {position for position, here in zip(row, mask, strict=True) if here}
        visited = [row.index(position) for position in there]
        orders.append(visited + [i for i, here in enumerate(mask) if not here])
    return torch.tensor(orders, device=pivots.device)
