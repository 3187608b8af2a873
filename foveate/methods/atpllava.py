"""ATP-LLaVA: thresholds that are learned, so that each image keeps as many tokens as it needs.

Paper: Ye et al., "ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models",
arXiv:2412.00447 (CVPR 2025), equations 3 to 13. No official code was found, so what is here is our
reading, after its abstract and a re-implementation by others. Where these leave things open:
scores are scaled to [0, 1] within an image, because a threshold in (0, 1) means nothing to logits;
attention of the text is told among the image's tokens alone;
how much visual tokens say to each other is the likeness of their keys to the mean key; the mean
over layers that the budget is about counts all decoder layers, those before the first step too; a
kept token's price grows with the layer as a share of the depth, not as its number; the number kept
is that of the hard choice, with the gradient of the soft one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.core import (
    Adaptive,
    Learning,
    ModelFacts,
    Need,
    Positions,
    Reduction,
    Step,
    TrainingPass,
    VisualTokens,
    by_count,
    register,
)
from foveate.core.fields import Natural, Positive, Range, UnitFloat, check_ascending
from foveate.core.ranking import TIE, top
from foveate.core.schedule import nearest
from foveate.core.transfer import members_of
from foveate.ops.learning import flops_of, untrained


class Thresholds(nn.Module):
    """Two thresholds of an image at each step, from the means of its two scores.

    Args:
        steps: of the method.
        inner: width of the hidden layer.
    """

    def __init__(self, steps: int, inner: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Linear(2, inner), nn.Linear(inner, 2)) for _ in range(steps)
        )

    def forward(self, number: int, means: Tensor) -> Tensor:
        """(G, 2, 1) thresholds in (0, 1) of a step, from (G, 2) means of scores."""
        step = self.steps[number]
        return step(means.to(next(step.parameters()).dtype)).sigmoid()[..., None].to(means)


@register(
    "atp-llava",
    stage="llm",
    does="drops below learned thresholds",
    needs=("question_attention", "llm_keys"),
    paper="Ye et al. 2024, arXiv:2412.00447",
)
@dataclass(frozen=True)
class ATPLLaVA(Learning, Adaptive):
    """Drop tokens below two learned thresholds: of redundancy, and of spatial coverage.

    In training all tokens stay, and gates multiply what later layers attend to. Thresholds are
    learned with the model's loss, a price for each token that is kept, and a pull towards a mean.

    Args:
        layers: decoder layers before which tokens are dropped; `None` scales the published
            (4, 14, 24) of 32 to the depth of the model.
        target: mean share of visual tokens over all decoder layers that training pulls towards.
        sampling: share of tokens on the grid that covers the image.
        coverage: how fast the score of those falls with `sampling`.
        temperature: of the gates.
        price: loss of a token that is kept, at the end of the model; earlier it is in proportion.
        pull: loss of the distance from the target.
        inner: width of what makes the thresholds.
        keep: always `None`: the thresholds decide.
        positions: survivors stay where they were; `renumbered` gives them consecutive positions
            where positions are single numbers.

    Cost: the attention of the question to the visual tokens, and the keys, of the layers.
    """

    layers: tuple[Natural, ...] | None = None
    target: UnitFloat = 0.25
    sampling: Annotated[float, Range(0, 1, above=True)] = 0.25
    coverage: Annotated[float, Range(0)] = 3.0
    temperature: Annotated[float, Range(0, above=True)] = 10.0
    price: Annotated[float, Range(0)] = 0.05
    pull: Annotated[float, Range(0)] = 0.2
    inner: Positive = 64
    keep: None = None
    positions: Positions | None = None
    published_positions = "original"
    published_layers: ClassVar[tuple[int, ...]] = (4, 14, 24)
    note = "atp-llava prunes by thresholds that are to be trained (foveate.prepare)"

    def check_fields(self) -> None:
        """As in `Method`; layers ascend.

        Raises:
            FoveateError: a field does not fit.
        """
        super().check_fields()
        check_ascending(self.layers)

    def places(self, model: ModelFacts) -> list[int]:
        """The decoder layers before which tokens are dropped."""
        if self.layers is not None:
            return list(self.layers)
        legal = [
            i
            for i in model.attention_layers
            if max(1, model.first_llm_layer) <= i <= model.last_llm_layer
        ]
        wanted = [layer * model.text_layers / 32 for layer in self.published_layers]
        return [layer for layer, _ in nearest(wanted, legal, self.slug)]

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction before each layer."""
        return tuple(
            Drop(
                "llm",
                layer,
                (Need("question_attention", (layer,)), Need("llm_keys", (layer,))),
                share=(after - layer) / model.text_layers,
                depth=layer / model.text_layers,
            )
            for layer, after in self._spans(model)
        )

    def _spans(self, model: ModelFacts) -> list[tuple[int, int]]:
        places = self.places(model)
        return list(zip(places, [*places[1:], model.text_layers], strict=True))

    def learned(self, model: ModelFacts) -> Thresholds:
        """What makes the thresholds of each step."""
        return untrained(lambda: Thresholds(len(self.places(model)), self.inner))

    def learned_flops(
        self, model: ModelFacts, step: Step, tokens: int, grid: tuple[int, int]
    ) -> int:
        """What the thresholds cost, counted on the meta device."""
        learned = self.learned(model).to("meta")
        return flops_of(lambda: learned(0, torch.empty(1, 2, device="meta")))

    def reduce_each(self, tokens: VisualTokens) -> Sequence[tuple[Sequence[int], Reduction]]:
        """Drop what is below both thresholds; the token furthest above them always stays."""
        there = torch.ones_like(tokens.index, dtype=torch.bool)
        kept = _kept(self._margins(tokens, there), there)
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
        return [
            (members, Reduction(members_of(order, members)[:, :count]))
            for count, members in by_count(kept.sum(1)).items()
        ]

    def reduce_softly(
        self, tokens: VisualTokens, count: int, training: TrainingPass
    ) -> Reduction | None:
        """Gate all tokens, and add the price of those that the hard choice would keep."""
        label = tokens.label
        if label is None:
            label = torch.ones(tokens.index.shape, device=tokens.index.device)
        there = label > 0  # what the hard choice has dropped has its sign changed
        margins = self._margins(tokens, there)
        kept = _kept(margins, there)
        gates = (self.temperature * margins).sigmoid().amax(1)
        gates = torch.where(kept & (margins <= 0).all(1), 1.0, gates)
        soft = gates * label.abs()
        share = (soft + (kept.to(soft) - soft).detach()).mean(1)
        self._add_losses(tokens, share, training)
        every = torch.arange(tokens.count, device=gates.device).expand_as(gates)
        return Reduction(every, gates=gates, label=torch.where(kept, soft, -soft))

    def _margins(self, tokens: VisualTokens, there: Tensor) -> Tensor:
        """(G, 2, V) how far redundancy and coverage are above their thresholds.

        Args:
            tokens: G images of V tokens.
            there: (G, V) tokens that the hard choice has not dropped before; others tell nothing.
        """
        learned: Any = tokens.learned
        seen, asked = tokens.signal("question_attention")[:, 0], tokens.signal("question_mask")
        seen = seen.float().masked_fill(~there[:, None, None], 0.0)
        seen = seen / seen.sum(-1, keepdim=True).clamp(min=torch.finfo(seen.dtype).tiny)
        cross = seen.sum((1, 2)) / (seen.shape[1] * asked.sum(1, keepdim=True).clamp(min=1))
        keys = F.normalize(tokens.signal("llm_keys")[:, 0].float(), dim=-1)
        among = there[:, None, :, None].to(keys)
        own = (keys * (keys * among).sum(2, keepdim=True)).sum(-1).mean(1)
        own = own / there.sum(1, keepdim=True)
        scaled = [_scaled(part, there) for part in (own, cross)]
        pair, noise = (torch.stack(parts, 1) for parts in zip(*scaled, strict=True))
        # What rounding alone lifts above a threshold is not above it.
        scores = torch.stack((pair.mean(1) - noise.mean(1), self._coverage(tokens)), 1)
        means = (pair * there[:, None]).sum(-1) / there.sum(1, keepdim=True)
        return scores - learned(tokens.number, means)

    def _coverage(self, tokens: VisualTokens) -> Tensor:
        """(G, V) score of the tokens on an even grid, 0 elsewhere."""
        stride = max(1, round(self.sampling**-0.5))
        sampled = (tokens.coordinates % stride == 0).all(-1)
        return sampled * max(0.0, 1 - self.sampling * self.coverage)

    def _add_losses(self, tokens: VisualTokens, kept: Tensor, training: TrainingPass) -> None:
        """The price of what is kept, and the distance of the batch's mean from the target."""
        step: Any = tokens.step
        training.add(f"{self.slug} price", self.price * step.depth * kept)
        shares = training.memory.setdefault(self.slug, {})
        shares.setdefault(step.layer, (step.share, []))[1].append(kept)
        means = [share * torch.cat(of).mean() for share, of in shares.values()]
        whole = 1 - sum(share for share, _ in shares.values())
        distance = (torch.stack(means).sum() + whole - self.target).abs()
        training.losses[f"{self.slug} pull"] = self.pull * distance


@dataclass(frozen=True)
class Drop(Step):
    """A step that knows what it decides about.

    Args:
        share: of the decoder layers, those from it to the next step.
        depth: of the layer, 0 to 1.
    """

    share: float = 0.0
    depth: float = 0.0


def _kept(margins: Tensor, there: Tensor) -> Tensor:
    """(G, V) which tokens stay: those above a threshold, or else the one that is least below.

    Args:
        margins: (G, 2, V) how far each is above the two thresholds.
        there: (G, V) tokens that there still are.
    """
    margin = margins.detach().amax(1).masked_fill(~there, -torch.inf)
    return (margin > TIE).scatter(1, top(margin, 1, 1.0), True)


def _scaled(scores: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """(G, V) scores, scaled so that those of the tokens there span [0, 1] in each image, and (G, 1)
    what rounding comes to there.
    """
    low = scores.masked_fill(~there, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~there, -torch.inf).amax(1, keepdim=True)
    flat = high - low <= TIE  # rounding alone tells them apart
    span = (high - low).masked_fill(flat, 1.0)
    return torch.where(flat, 1.0, (scores - low) / span), TIE / span
