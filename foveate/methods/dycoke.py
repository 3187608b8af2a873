"""DyCoke: drop the tokens of a video that repeat those of a frame before.

Paper: Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
arXiv:2411.15024 (CVPR 2025). Reference code: KD-TAO/DyCoke @ dd74634. The paper speaks of merging;
its code drops, and so does this.
In decoding, layers after the first few attend to the visual tokens that matter to the new token
only; nothing is deleted, so that tokens can come back.
Differs from the reference, unless `as_released`: survivors of a frame stay in raster order (there:
in the order of similarity, which permutes their positions); the third frame of the last window is
reduced too; an odd last frame is reduced like others (there: lost); videos of four frames and fewer
work (there: an error); a decoding step whose attention is like the last one's goes on with the last
choice (there: it attends to all, so that with steady attention nothing is ever left out). In both
forms any batch works, each row chooses for itself, and videos are told from images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import ModelFacts, Positions, Reduction, Step, VisualTokens, register
from foveate.core.decode_selector import DecodeChoice, DecodeSelector
from foveate.core.fields import Positive, UnitFloat
from foveate.core.ranking import ranked
from foveate.core.schedule import ranked_before
from foveate.core.video import (
    Parts,
    VideoMethod,
    by_frame,
    check_switch,
    exact,
    similarity,
)
from foveate.errors import InputError

WINDOW = 4
"""Frames of which the first stays whole."""


@register(
    "dycoke",
    stage="pre_llm",
    does="video: drops what frames repeat",
    paper="Tao et al. 2025, arXiv:2411.15024",
)
@dataclass(frozen=True)
class DyCoke(VideoMethod, DecodeSelector):
    """Keep every fourth frame whole, and of the others what is new.

    Of each four frames, the second is compared with the first, the fourth with the third and the
    third with the first, cell by cell; they keep what is least similar. Images pass untouched.

    Args:
        k: share of the tokens that a compared frame loses.
        p: share of the visual tokens that a decoding step leaves out; 0 attends to all.
        layer: decoder layer from which on it does (the release's `L`), by the attention of the
            layer before. `None` takes 3, or the nearest after a layer that sees everything.
        threshold: cosine of the attention of two steps above which the choice stays.
        as_released: reproduce the released code's order and frames, see above.
        keep: `None`, as `k` decides; 1.0 removes nothing.
        positions: `None` gives survivors consecutive positions (`renumbered`), as the reference
            does, where positions are single numbers; `original` leaves them where they were.

    Cost: one cosine for each compared token, O(V·D); in decoding one row of attention a step.
    """

    k: UnitFloat = 0.7
    p: UnitFloat = 0.8
    layer: Positive | None = None
    threshold: float = 0.9
    as_released: bool = False
    keep: float | None = None
    positions: Positions | None = None

    def check_budget(self, steps: int | None) -> None:
        """Check that no budget is given.

        Raises:
            BudgetError: `keep` is neither `None` nor 1.0.
        """
        check_switch(self.slug, self.keep)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One reduction after the projector, and the choice of decoding steps."""
        drop = Step("pre_llm", whole=True)
        if self.p == 0 or self.keep == 1.0:
            return (drop,)
        return (drop, Step("llm", self.layer or self._published(model), effects=("decode",)))

    def _published(self, model: ModelFacts) -> int:
        """The layer nearest to the release's 3; nothing is dropped before it."""
        without = "use p=0.0, which does without"
        return ranked_before(3, model, self.slug, drops=False, otherwise=without)

    def reduce_videos(self, tokens: VisualTokens) -> Parts:
        """Keep whole frames and the least similar tokens of the others."""
        x = exact(by_frame(tokens.x, tokens))
        frames, cells = x.shape[1:3]
        new = int((1 - self.k) * cells)
        reference = references(frames, as_released=self.as_released)
        reduced = [t for t, other in enumerate(reference) if other != t]
        likeness = similarity(x[:, reduced], x[:, [reference[t] for t in reduced]])
        kept = ranked(-likeness, 1.0)[..., :new]  # (G, frames, new)
        if not self.as_released:
            kept = kept.sort(-1).values
        whole = torch.arange(cells, device=x.device).expand(len(x), -1)
        of_frame = dict(zip(reduced, kept.unbind(1), strict=True))
        parts = [of_frame.get(t, whole) + t * cells for t in range(len(reference))]
        return [
            (tuple(range(len(x))), Reduction(torch.cat(parts, 1), ordered=self.as_released)),
        ]

    def selects_from(self, frames: int) -> bool:
        """Decoding leaves out tokens of videos alone."""
        return frames > 1

    def choose(self, attention: Tensor, real: Tensor, before: DecodeChoice | None) -> DecodeChoice:
        """Look at the most attended tokens, and at the same ones while attention stays alike."""
        now = attention.mean(1)
        order = now.masked_fill(~real, -1.0).argsort(dim=-1, descending=True, stable=True)
        count = (real.sum(1, keepdim=True).double() * (1 - self.p)).long()
        rank = torch.arange(real.shape[1], device=real.device)
        seen = torch.zeros_like(real).scatter(1, order, rank < count)
        if before is not None:
            alike = similarity(now, before.attention)[:, None] >= self.threshold
            seen = torch.where(alike, real if self.as_released else before.seen, seen)
        return DecodeChoice(now, seen)


def references(frames: int, *, as_released: bool = False) -> list[int]:
    """The frame that each frame is compared with; its own number for those that stay whole.

    Raises:
        InputError: the released code cannot take so few frames.
    """
    reference = [t - 1 if t % 2 else t - t % WINDOW for t in range(frames)]
    if not as_released:
        return reference
    if frames <= WINDOW:
        raise InputError(
            f"the released code of dycoke fails on a video of {frames} frames, which is one window "
            f"of {WINDOW} at most; use as_released=False"
        )
    whole = [
        t if t % WINDOW == 2 and t >= frames - 2 else other for t, other in enumerate(reference)
    ]
    return whole[: frames // 2 * 2]
