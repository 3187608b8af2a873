"""Zero-TPrune: after some encoder layers, drop tokens by a PageRank of the attention graph.

Paper: Wang et al., "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph
in Pre-Trained Transformers", arXiv:2305.17328 (CVPR 2024). Its authors have published no code of
it; of an earlier form of theirs (Hongjiew/Transformer_pruning @ 52a4607) outputs were recorded,
which cover the iteration and the mean over heads. All else is our reading of the paper's text:
scores of a head are scaled to a mean of one before their variance is taken; a head's scores count
all the same if no head passes; keys are averaged over heads, as in ToMe; rows of the map are
normed again once similar tokens are gone; half of what goes is similar, half unimportant; layers
and shares are those at which the published saving of a third is met on DeiT-S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core import (
    Keep,
    LayerAttention,
    ModelFacts,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)
from foveate.core.encoder_schedule import EncoderScheduled
from foveate.core.fields import Natural, Positive, Range, UnitFloat
from foveate.core.ranking import ranked
from foveate.core.schedule import Drop
from foveate.core.step import Effect
from foveate.errors import LayerError
from foveate.io.quoting import quoted
from foveate.ops.map_attention import attend_with_maps
from foveate.ops.page_rank import page_rank

Count = Annotated[float, Range(0)]


@dataclass(frozen=True)
class Look(Drop):
    """A look at the attention of a layer.

    Args:
        rounds: rounds of votes.
        first: whether the class token's vote counts more in the first of them.
    """

    rounds: int = 1
    first: bool = False


@register(
    "zero-tprune",
    stage="vision",
    does="PageRank of the attention graph",
    paper="Wang et al. 2023, arXiv:2305.17328",
)
@dataclass(frozen=True)
class ZeroTPrune(EncoderScheduled):
    """Drop the tokens that are like more important ones, then those that get the fewest votes.

    Each token votes for those it attends to, and its vote counts as much as what it gets itself.

    Args:
        layers: encoder layers after which tokens are dropped, ascending; `None` scales 2, 5 and 8
            of 12 to the encoder.
        keep: what survives each drop, as a share of the ORIGINAL count of each image, or a count.
        similar: share of what is dropped that goes for its likeness, at most half of the tokens.
        iterations: rounds of votes after each of the layers; `None` takes 30 in the first quarter
            of the encoder, 1 in the last, and 5 between them.
        start: whose vote counts first: that of the class token (`class`) sqrt(N) times as much as
            others', or all alike (`uniform`); `None` for the class token's where there is one.
        variance: (least, most) variance of a head's scores that count.
        positions: of the survivors in a language model; `None` makes them consecutive
            (`renumbered`) where positions are single numbers, `original` leaves them.

    Cost: in each of the layers N x N multiply-adds a round and head. Attention maps are looked at
    while attention is computed, and never held together.
    """

    layers: tuple[Natural, ...] | None = None
    keep: Keep = (0.8, 0.54, 0.3)
    similar: UnitFloat = 0.5
    iterations: tuple[Positive, ...] | None = None
    start: Literal["class", "uniform"] | None = None
    variance: tuple[Count, Count] = (0.01, 0.7)
    positions: Positions | None = None
    rounding = round
    published_layers = (2, 5, 8)
    lasting = 1

    def check_fields(self) -> None:
        """As in `EncoderScheduled`; `iterations` are given with `layers`, one for each.

        Raises:
            LayerError: they are not, or a layer does not fit.
            FoveateError: another field does not fit its annotation.
        """
        super().check_fields()
        if self.iterations is not None and (
            self.layers is None or len(self.iterations) != len(self.layers)
        ):
            raise LayerError(
                f"iterations must have one entry for each of the layers {quoted(self.layers)}, got "
                f"{quoted(self.iterations)}"
            )

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """For each of the layers, a look at its attention and a drop before the next.

        Raises:
            LayerError: no layer fits, or the class token is to vote first, and there is none.
        """
        if self.start == "class" and not model.class_token:
            raise LayerError(
                f"zero-tprune with start='class' needs a class token, but the encoder of this "
                f"{model.model_type} has none; start='uniform' works"
            )
        first = model.class_token if self.start is None else self.start == "class"
        steps: list[Step] = []
        for layer, entry in self.drops(model):
            rounds = _rounds(layer, model.vision_layers)
            if self.iterations is not None:
                rounds = self.iterations[entry]
            effects: tuple[Effect, ...] = ("attend", "look")
            steps += (
                Look("vision", layer, effects=effects, entry=entry, rounds=rounds, first=first),
                Drop("vision", layer + 1, entry=entry),
            )
        return tuple(steps)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """As in `EncoderScheduled`; all while attention is looked at."""
        if isinstance(step, Look):
            return remaining
        return super().count(remaining, total, step, number, row)

    def attend(self, tokens: VisualTokens, layer: LayerAttention) -> Tensor:
        """The layer's attention; notes what the drop before the next layer goes by."""
        total = tokens.memory.setdefault("total", tokens.count)
        kept = super().count(tokens.count, total, tokens.step, tokens.number)
        if kept == tokens.count:
            return layer.plain()
        alike = min(int((tokens.count - kept) * self.similar), tokens.count // 2)
        scores: list[Tensor] = []

        def look(weights: Tensor) -> Tensor:
            done = sum(map(len, scores))
            keys = layer.key[done : done + len(weights)].detach().float().mean(1)
            votes = self.scores(weights.detach().float(), keys, alike, tokens.step, layer)
            scores.append(votes)
            return weights

        mixed = attend_with_maps(layer, look)
        tokens.memory["scores"] = torch.cat(scores)
        return mixed

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep the highest scores."""
        return Reduction.top(tokens.memory["scores"], count)

    def scores(
        self, weights: Tensor, keys: Tensor, alike: int, look: Look, layer: LayerAttention
    ) -> Tensor:
        """(b, V) scores of patches.

        Args:
            weights: (b, H, N, N) attention.
            keys: (b, N, d), the mean over heads.
            alike: how many patches go for their likeness, whose score is -inf.
            look: rounds of votes, and whose count first.
            layer: which rows are those of a patch.
        """
        start = torch.ones(weights.shape[-1], device=weights.device)
        if look.first:
            start[0] = len(start) ** 0.5
        first = self.over_heads(layer.of_tokens(page_rank(weights, start, 1)))
        keys = layer.of_tokens(keys.transpose(1, 2)).transpose(1, 2)
        gone, there = similar(keys, ranked(first), alike), None
        if alike:
            there = torch.ones_like(weights[:, :1, :1])
            there[:, 0, 0, layer.rows] = (~gone[..., None]).to(there).expand(-1, *layer.rows.shape)
        votes = layer.of_tokens(page_rank(weights, start, look.rounds, there))
        return self.over_heads(votes).masked_fill(gone, -torch.inf)

    def over_heads(self, votes: Tensor) -> Tensor:
        """(b, V) root of the mean square over the heads whose variance lies in range."""
        least, most = self.variance
        spread = (votes / votes.mean(-1, keepdim=True)).var(-1, correction=0)
        counts = (spread >= least) & (spread <= most)
        counts = (counts | ~counts.any(1, keepdim=True)).float()[..., None]
        return (votes.square() * counts).sum(1).div(counts.sum(1)).sqrt()


def similar(keys: Tensor, order: Tensor, count: int) -> Tensor:
    """(b, V) which tokens of the less important half are most like one of the other half.

    Args:
        keys: (b, V, C).
        order: (b, V) positions, the most important first.
        count: how many.
    """
    gone = torch.zeros_like(order, dtype=torch.bool)
    if not count:
        return gone
    keys = F.normalize(keys, dim=-1)
    half = order.shape[1] // 2
    more, less = order[:, :-half], order[:, -half:]
    values = (keys.gather(1, of[..., None].expand(-1, -1, keys.shape[2])) for of in (less, more))
    own, others = values
    best = torch.matmul(own, others.transpose(1, 2)).amax(-1)
    chosen = ranked(best, 1.0)[:, :count]
    return gone.scatter(1, less.gather(1, chosen), True)


def _rounds(layer: int, layers: int) -> int:
    """Rounds of votes after a layer, as published for 12 layers."""
    if 4 * layer < layers:
        return 30
    return 1 if 4 * layer >= 3 * layers else 5
