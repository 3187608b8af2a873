"""ToC3D: foreground tokens go through a layer; the others get what one that stands for them gains.

Paper: Zhang et al., "Make Your ViT-based Multi-view 3D Detectors Faster via Token Compression",
arXiv:2409.00633 (ECCV 2024). Reference code: DYZhang09/ToC3D @ 32ae961; nothing of it is copied.
What is here is its block of two speeds, in any encoder and without training; the published scorer
is learned, and moves a detector's queries along with the car. Differs from the reference: scores
are attention of queries that the caller passes, or else of the class token, or how unlike the mean
token a token is; the representative weighs tokens by their scores (there: by log-probabilities
divided by their sum, so that the least important weigh most, and padding of windows nearly all);
it has no position (there: the one whose number is how many tokens are kept); tokens go through in
raster order (there: by score); between scorings nothing is masked (there: softly, at random); an
encoder is one window. `share` is the release's keep ratio, `scored` its pruning_loc.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core import Approximate, Method, ModelFacts, Need, Step, VisualTokens, register
from foveate.core.fields import Natural, UnitFloat, check_ascending
from foveate.core.ranking import top
from foveate.errors import FoveateError, InputError
from foveate.io.quoting import quoted


@dataclass(frozen=True)
class TwoSpeeds(Step):
    """A layer that some tokens go through.

    Args:
        share: of the tokens.
        scored: whether tokens are scored before it; else as before an earlier layer.
    """

    share: float = 1.0
    scored: bool = False


@register(
    "toc3d",
    stage="vision",
    does="runs the best, updates the rest",
    paper="Zhang et al. 2024, arXiv:2409.00633",
)
@dataclass(frozen=True)
class ToC3D(Approximate):
    """Let the best-scored tokens and one representative of the others go through encoder layers.

    The representative is the mean of the others, weighted by their scores. What the layer adds to
    it is added to each of them. Special tokens go through. Nothing is removed.

    Args:
        share: of tokens that go through: one share, or one for each entry of `scored`.
        scored: layers before which tokens are scored, and from the first of which on layers are
            computed so; `None` for a quarter, a half and three quarters of those that are read.
        score: `cls`, the class token's attention in the layer; `distinct`, one less the cosine to
            the image's mean token; `None` for the first where there is a class token.
        queries: returns (Q, D) or (B, Q, D) queries to score by in place of that, such as those
            that a detector remembers of earlier frames, in the width of the encoder's rows; it is
            called whenever tokens are scored. A token's score is the attention that it gets of all.
        layers: encoder layers that are computed so; `None` for all from the first scoring on.
        keep: `None`: nothing is removed.
        positions: without effect, as nothing is removed.

    Cost: of each scoring, one row of attention, or the product of tokens and queries.
    """

    note = "toc3d scores tokens without its learned scorer, so that published results do not apply"
    effect = "around"
    share: UnitFloat | tuple[UnitFloat, ...] = (0.7, 0.5, 0.5)
    scored: tuple[Natural, ...] | None = None
    score: Literal["cls", "distinct"] | None = None
    queries: Callable[[], Tensor] | None = None

    def check_fields(self) -> None:
        """As in `Approximate`; `scored` ascends, and `share` has as many entries, if several.

        Raises:
            LayerError: `layers` or `scored` is empty or not ascending.
            FoveateError: another field does not fit.
        """
        super().check_fields()
        if self.queries is not None and not _is_function(self.queries):
            raise FoveateError(
                "queries must be a function of nothing that returns them, got "
                f"{quoted(self.queries)} in {self.slug}"
            )
        check_ascending(self.scored, "scored")
        times = 3 if self.scored is None else len(self.scored)
        if isinstance(self.share, tuple) and len(self.share) != times:
            raise FoveateError(
                f"share must be one share, or one for each of {times} scorings, got "
                f"{quoted(self.share)} in {self.slug}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As in `Method`; of queries only whether there are any."""
        said = Method.to_dict(replace(self, queries=None))
        return {**said, "queries": None if self.queries is None else "given by the caller"}

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """A step around each layer."""
        read = model.feature_layer + 1
        scored = self.scored or tuple(read * part // 4 for part in (1, 2, 3))
        layers = range(scored[0], read) if self.layers is None else self.layers
        by_class = self.score == "cls" or (self.score is None and model.class_token)
        found: list[Step] = []
        before = 0  # scorings so far
        for layer in layers:
            times = max(sum(start <= layer for start in scored), 1)
            share = self.share[times - 1] if isinstance(self.share, tuple) else self.share
            new, before = times > before, times
            reads = new and by_class and self.queries is None
            needs = (Need("cls_attention", (layer,)),) if reads else ()
            found.append(
                TwoSpeeds(
                    "vision", layer, needs, whole=True, effects=("around",), share=share, scored=new
                )
            )
        return tuple(found)

    def entering(self, tokens: int, step: Step) -> int:
        """The share of them, and the representative of the others if there are any."""
        assert isinstance(step, TwoSpeeds)
        return min(int(tokens * step.share) + 1, tokens)

    def enter(self, tokens: VisualTokens, states: Tensor) -> Tensor:
        """The best-scored, in raster order, and the representative after them."""
        if tokens.step.scored:
            tokens.memory["scores"] = self.scores(tokens)
        scores, total = tokens.memory["scores"], states.shape[1]
        slow = int(total * tokens.step.share)
        if slow == total:
            return states
        index = top(scores, slow)
        weights = scores.scatter(1, index, 0.0)  # of the others
        others = torch.ones_like(scores).scatter(1, index, 0.0)
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, others)
        weights = (weights / weights.sum(1, keepdim=True)).to(states)
        one = (weights[..., None] * states).sum(1, keepdim=True)
        tokens.memory["through"] = index, one
        return torch.cat((states.gather(1, _wide(index, states)), one), 1)

    def leave(self, tokens: VisualTokens, states: Tensor, passed: Tensor) -> Tensor:
        """What has gone through, and the others with what their representative has gained."""
        if passed.shape[1] == states.shape[1] and tokens.step.share == 1:
            return passed
        index, one = tokens.memory.pop("through")
        slow, last = passed[:, :-1], passed[:, -1:]
        return (states + (last - one)).scatter(1, _wide(index, states), slow)

    @torch.no_grad()
    def scores(self, tokens: VisualTokens) -> Tensor:
        """(G, V) scores of tokens, none below 0.

        Raises:
            InputError: queries do not have the width of the tokens, or are not as many as images.
        """
        if self.queries is not None:
            queries, x = self.queries(), tokens.x
            images, _, width = x.shape
            wanted = (width,) if queries.dim() == 2 else (images, width)
            if queries.dim() not in (2, 3) or (*queries.shape[:-2], queries.shape[-1]) != wanted:
                raise InputError(
                    f"toc3d needs queries of (Q, {width}) or ({images}, Q, {width}), got "
                    f"{tuple(queries.shape)}"
                )
            attention = (queries.to(x) @ x.transpose(1, 2) / width**0.5).float().softmax(-1)
            return attention.mean(1)
        if "cls_attention" in tokens.signals:
            return tokens.signal("cls_attention")[:, 0].mean(1).float()
        x = tokens.x.float()
        return (1 - F.cosine_similarity(x, x.mean(1, keepdim=True), dim=-1)).clamp(min=0)


def _wide(index: Tensor, states: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, states.shape[-1])


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type)
