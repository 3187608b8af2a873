"""Segments: where a video is cut.

Shapes: `T` frames of a video, `d` width of what stands for a frame.
"""

from __future__ import annotations

from torch import Tensor

from foveate.core.ranking import bottom
from foveate.core.video import similarity


def segments_of(frame: Tensor, segments: int, tau: float) -> list[tuple[int, int]]:
    """Cut a video where neighbouring frames differ.

    Args:
        frame: (T, d) what stands for each frame.
        segments: least number of segments; at most one for each frame.
        tau: cosine below which there is a cut anyway.

    Returns:
        First and last frame of each segment.
    """
    alike = similarity(frame[1:], frame[:-1])
    cut = alike < tau
    cut[bottom(alike, min(segments - 1, len(alike)), 1.0)] = True
    last = [*cut.nonzero()[:, 0].tolist(), len(alike)]
    return list(zip([0, *(t + 1 for t in last[:-1])], last, strict=True))
