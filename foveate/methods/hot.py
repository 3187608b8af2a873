"""HoT: between two layers of a video encoder a few representative frames stand for all of them.

Paper: Li et al., "Hourglass Tokenizer for Efficient Transformer-Based 3D Human Pose Estimation",
arXiv:2311.12028 (CVPR 2024). Reference code: NationalGAILab/HoT @ 873b5bd.
There it is part of models of human poses, whose tokens are joints. Here tokens are patches of a
video encoder, and a frame is a tubelet.
Differs from the reference: of equally dense frames the earlier counts as denser (there: random
noise decides anew in each forward; `seed` draws it once), as two frames that are each other's
nearest are always equally dense for k = 2; distances are computed in float64 (there: above 25
frames by a product too coarse for that noise); queries are projected once (there: for each joint).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.core import Method, ModelFacts, Positions, Reduction, Step, VisualTokens, register
from foveate.core.budget import count as budget_count
from foveate.core.fields import Natural, Positive
from foveate.core.ranking import top
from foveate.core.reduction import take_rows
from foveate.core.video import check_one_share
from foveate.errors import FoveateError, InputError, UnsupportedModelError
from foveate.ops.clustering import peaks, squared_distances
from foveate.ops.frames import FrameRecovery
from foveate.ops.learning import flops_of, untrained

NOISE = 1e-6  # by which densities that are equal differ
NOTE = "hot brings frames back by parameters of its own, which are to be trained (foveate.prepare)"


@dataclass(frozen=True)
class Frames(Step):
    """A step that knows how many frames the model's videos have."""

    frames: int = 1


@register(
    "hot",
    stage="vision",
    does="keeps representative frames",
    paper="Li et al. 2024, arXiv:2311.12028",
)
@dataclass(frozen=True)
class HoT(Method):
    """Keep the frames at the peaks of density, by the mean of their tokens; after the last layer,
    learned queries bring all frames back by attending to those that were kept.

    Published for MixSTE: 81 of 243 frames from layer 3 of 8; without `recover`, 61 from layer 7.

    Args:
        layer: encoder layer before which frames leave; `None` for the published 3 of 8.
        frames: how many are kept; `None` for the share `keep`.
        k: nearest frames that make up the density of a frame, which is the first of them.
        recover: bring frames back. Those that were kept get a learned position each, by their
            rank. Without it (the paper's TPC) nothing is learned, the middle frame is always kept,
            and whatever reads all frames sees the mean of those kept in place of others.
        heads: of the attention that brings frames back.
        seed: of noise that decides which of equally dense frames is denser; `None` for the earlier.
        keep: share of frames.
        positions: not used; encoders alone have no language model.

    Cost: one product of all pairs of frames; with `recover`, one cross-attention along time.
    """

    layer: Natural | None = None
    frames: Positive | None = None
    k: Positive = 2
    recover: bool = True
    heads: Positive = 8
    seed: Natural | None = None
    keep: float = 1 / 3
    positions: Positions | None = None
    encoders_alone = True

    def check_budget(self, steps: int | None) -> None:
        """Check `keep`.

        Raises:
            BudgetError: it is no share.
        """
        check_one_share(self.keep)
        super().check_budget(steps)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One step, before the layer.

        Raises:
            UnsupportedModelError: the encoder is not one of videos.
            FoveateError: heads do not divide the width.
        """
        if not model.vision_frames:
            raise UnsupportedModelError(
                f"'hot' chooses among the frames of a video that an encoder sees together, but "
                f"{model.model_type!r} encodes images, or frames one by one"
            )
        if self.recover and model.vision_width % self.heads:
            raise FoveateError(
                f"heads of hot must divide the encoder's width {model.vision_width}, got "
                f"{self.heads}"
            )
        layer = (model.feature_layer + 1) * 3 // 8 if self.layer is None else self.layer
        return (
            Frames(
                "vision",
                layer,
                effects=("exit",) if self.recover else (),
                frames=model.vision_frames,
            ),
        )

    def learned(self, model: ModelFacts) -> FrameRecovery | None:
        """What brings frames back; `None` without `recover`."""
        if not self.recover:
            return None
        width, total = model.vision_width, model.vision_frames
        return untrained(lambda: FrameRecovery(width, total, self.kept_of(total), self.heads))

    def learned_flops(
        self, model: ModelFacts, step: Step, tokens: int, grid: tuple[int, int]
    ) -> int:
        """What it costs to bring frames back, counted on the meta device."""
        total, learned = model.vision_frames, self.learned(model)
        kept = self.kept_of(total)
        if learned is None or kept == total:
            return 0
        recovery = learned.to("meta")
        states = torch.empty(1, kept, tokens // total, model.vision_width, device="meta")
        return flops_of(lambda: recovery(states))

    def note_on(self, model: ModelFacts) -> str:
        """That it is to be trained, where it learns."""
        return NOTE if self.recover else ""

    def kept_of(self, frames: int) -> int:
        """Frames of a video that are kept."""
        if self.frames is not None:
            return min(self.frames, frames)
        return budget_count(self.keep, frames, step=0, rounding=type(self).rounding, row=0)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """The tokens of the frames that are kept."""
        frames = step.frames if isinstance(step, Frames) else 1
        return min(self.kept_of(frames) * (total // frames), remaining)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep the representative frames, in order.

        Raises:
            InputError: a video has another number of frames than the model's.
        """
        frames, planned = tokens.frames, tokens.step.frames
        if planned != frames:
            raise InputError(
                f"hot is set up for the {planned} frames that videos of this encoder have, but one "
                f"has {frames} (a tubelet counts as a frame); give it videos of that length, or a "
                "model whose config says another"
            )
        x, of_frame = tokens.x, tokens.count // frames
        middle = None if self.recover else (frames - 1) // 2
        scores = self.scores(x.unflatten(1, (frames, -1)).mean(2), middle)
        chosen = top(scores, count // of_frame, 1.0)
        cells = torch.arange(of_frame, device=chosen.device)
        index = (chosen[..., None] * of_frame + cells).flatten(1)
        if tokens.learned is None or chosen.shape[1] == frames:
            return Reduction(index)
        learned: Any = tokens.learned
        ranks = learned.positions.repeat_interleave(of_frame, 0)
        return replace(Reduction(index), values=take_rows(x, index) + ranks)

    def reinsert(self, tokens: VisualTokens, kept: Tensor, now: Tensor) -> Tensor:
        """All frames, made of those that were kept."""
        learned: Any = tokens.learned
        cells = tokens.count // tokens.frames
        states = now.unflatten(1, (-1, cells)).to(learned.queries.dtype)
        return learned(states).flatten(1, 2).to(now.dtype)

    def scores(
        self, frames: Tensor, middle: int | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """(G, F) how representative each frame is, as a logarithm.

        Args:
            frames: (G, F, D) mean of the tokens of each frame.
            middle: a frame that is to be kept in any case.
            noise: (F) or (G, F) in [0, 1], in parts per million; `None` as `seed` says.
        """
        total = frames.shape[1]
        if noise is None:
            noise = 1 - torch.arange(total, dtype=torch.float64) / total
            if self.seed is not None:
                noise = torch.rand(total, generator=torch.Generator().manual_seed(self.seed))
        distance = squared_distances(frames.double())
        scores = peaks(distance, self.k, noise.to(distance) * NOISE)
        if middle is not None:
            scores[:, middle] = torch.inf
        return scores
