"""EVS: keep the tokens of a video that changed most since the frame before.

Paper: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference"
(NVIDIA), arXiv:2510.14624, in the form in which it is served: cosine of token embeddings and an
exact budget, where the paper (by a secondary account; unverified) cuts the difference of pixels at
a percentile. Reference code: vllm-project/vllm, multimodal/evs.py @ 926c71f, whose notice is
restrictive: written from a description of the algorithm, nothing is taken.
Differs from the reference: any batch works; similarities are taken in float32 at least; on models
with positions in time, height and width the text after a video stays where the model puts it
(there: it continues after the grid's width, where it can run into the video's positions); tokens
after the last frame, such as a newline, stay and count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core import Keep, Positions, Reduction, VisualTokens, register
from foveate.core.video import Parts, VideoMethod, by_frame, exact, similarity


@register(
    "evs",
    stage="pre_llm",
    does="video: keeps what changes most",
    paper="NVIDIA 2025, arXiv:2510.14624",
)
@dataclass(frozen=True)
class EVS(VideoMethod):
    """Rank tokens by how little they resemble the token at their cell in the frame before.

    The first frame always stays whole, so that a video keeps at least one frame's tokens: of T
    frames, a share of 1/T or less leaves the first alone, whatever happens later, and less than 1/T
    is exceeded, which the report notes. A frame after it keeps as many as changed, which may be
    none. Images pass untouched.

    Args:
        keep: what survives of a video, its first frame included: a share, 1 - q of the release
            (whose one published rate is q = 0.7), or a count. Shares are truncated, as there.
        positions: `None` gives survivors consecutive positions (`renumbered`), as the reference
            does, where positions are single numbers; `original` leaves them where they were.

    Cost: one cosine for each token, O(V·D), and one sort.
    """

    keep: Keep = 0.3
    positions: Positions | None = None
    rounding = math.trunc
    merges, first_whole = False, True

    def reduce_videos(self, tokens: VisualTokens) -> Parts:
        """Keep what changed most."""
        x = exact(by_frame(tokens.x, tokens))
        videos, frames, cells = x.shape[:3]
        rest = tokens.count - frames * cells
        count = max(tokens.quota - rest, cells)
        order = change(x).flatten(1).argsort(dim=-1, descending=True, stable=True)
        return [(tuple(range(videos)), Reduction(order[:, :count].sort(-1).values))]


def change(x: Tensor) -> Tensor:
    """One minus the cosine to the token at the same cell one frame before.

    Args:
        x: (G, T, P, D) tokens by frame.

    Returns:
        (G, T, P); infinite in the first frame.
    """
    first = torch.full_like(x[:, :1, :, 0], torch.inf)
    return torch.cat((first, 1 - similarity(x[:, 1:], x[:, :-1])), 1)
