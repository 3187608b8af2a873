"""VidCom2: more tokens for frames that stand out of a video, and of each what stands out most.

Paper: Liu et al., "Video Compression Commander: Plug-and-Play Inference Acceleration for Video
Large Language Models", arXiv:2505.14454 (EMNLP 2025). Reference code: xuyang-liu16/VidCom2 @
944a17d.
Differs from the reference: any batch works; features are compared in float32 at least; shares of a
frame that are a half but for rounding round to even, as a half does (there: rounding decides); ties
go to the lower index; tokens after the last frame, such as a newline, stay and do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import Positions, Reduction, VisualTokens, by_count, register
from foveate.core.ranking import among_top, bottom, marked
from foveate.core.transfer import members_of
from foveate.core.video import (
    Parts,
    VideoMethod,
    by_frame,
    check_one_share,
    exact,
    normalize,
)

CHANNELS = 0.5
TEMPERATURE = 0.01
WIDTHS = tuple(2.0**k for k in range(-3, 2))
"""Share of the channels that are compared, temperature of frames, and variances of the kernels;
fixed in the release."""
GRAIN = 2.0**12  # parts of a token that counts of a frame are told apart by


@register(
    "vidcom2",
    stage="pre_llm",
    does="video: keeps what stands out",
    paper="Liu et al. 2025, arXiv:2505.14454",
)
@dataclass(frozen=True)
class VidCom2(VideoMethod):
    """Keep the tokens that are least like the mean of the video and the mean of their frame.

    Likeness is a sum of Gaussian kernels of the distance, over the half of the channels that vary
    least. Frames whose tokens are less like the video's mean keep more. Images pass untouched.

    Args:
        keep: share of the tokens of a video to aim at (the release's `base_scale`). Frames are
            rounded one by one, half to even, and keep one token at least, so that counts differ a
            little.
        positions: `None` gives survivors consecutive positions (`renumbered`), as the reference
            does, where positions are single numbers; `original` leaves them where they were.

    Cost: two products of each token with a mean, O(V·D), and one sort.
    """

    keep: float = 0.25
    positions: Positions | None = None
    merges = False

    def check_budget(self, steps: int | None) -> None:
        """Check `keep`, which is one share.

        Raises:
            BudgetError: it is something else.
        """
        super().check_budget(steps)
        check_one_share(self.keep)

    def reduce_videos(self, tokens: VisualTokens) -> Parts:
        """Keep of each frame what stands out."""
        of_video, of_frame = likeness(steady_channels(exact(by_frame(tokens.x, tokens))))
        counts = self.counts(of_video)
        scores = -(of_video + of_frame)
        kept = among_top(scores.flatten(0, 1), counts.view(-1, 1), scores.shape[-1])
        kept = kept.view(len(scores), -1)
        return [
            (tuple(members), Reduction(marked(members_of(kept, members), count)))
            for count, members in by_count(kept.sum(1)).items()
        ]

    def counts(self, likeness: Tensor) -> Tensor:
        """(G, T) tokens that frames keep, of (G, T, P) likeness of tokens to the video's mean."""
        share = (-likeness.mean(-1) / TEMPERATURE).softmax(-1)
        rate = self.keep * (1 + share - share.mean(-1, keepdim=True))
        cells = rate.clamp(max=1.0) * likeness.shape[-1]
        return ((cells * GRAIN).round() / GRAIN).round().long().clamp(min=1)


def steady_channels(x: Tensor) -> Tensor:
    """(G, T, P, C) the half of the channels of (G, T, P, D) tokens that vary least in a video."""
    variance = x.flatten(1, 2).var(1, correction=0)
    steady = bottom(variance, int(x.shape[-1] * CHANNELS))
    return x.gather(-1, steady[:, None, None].expand(*x.shape[:3], -1))


def likeness(x: Tensor) -> tuple[Tensor, Tensor]:
    """Likeness of tokens to the mean of their video and to that of their frame, in float64.

    Args:
        x: (G, T, P, C) tokens by frame; their length does not matter.

    Returns:
        (G, T, P) each, from 0 to the number of kernels.
    """
    x = normalize(x)
    frame = x.mean(2, keepdim=True)
    return _kernels(x, frame.mean(1, keepdim=True)), _kernels(x, frame)


def _kernels(x: Tensor, center: Tensor) -> Tensor:
    """(G, T, P) sum of Gaussian kernels of the distance of tokens to their center."""
    near = (x * center).sum(-1).double()
    distance = x.square().sum(-1).double() + center.square().sum(-1).double() - 2 * near
    return sum(((-distance / (2 * width)).exp() for width in WIDTHS), torch.zeros_like(distance))
