"""Segments: where a video is cut, and what stands still in between.

Shapes: `T` frames of a video, `d` width of what stands for a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from foveate.core.ranking import bottom
from foveate.core.video import normalize, similarity


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


def likeness_over_time(x: Tensor) -> Tensor:
    """Mean cosine of all pairs of frames at each cell.

    Args:
        x: (W, P, D) tokens of a window.

    Returns:
        (P); minus infinity for a window of one frame, which has no pairs.
    """
    frames = len(x)
    if frames == 1:
        return x.new_full(x.shape[1:2], -torch.inf)
    x = normalize(x)
    pairs = x.sum(0).square().sum(-1) - x.square().sum((0, 2))
    return pairs / (frames * (frames - 1))


def windows(labels: Sequence[int]) -> list[int]:
    """Lengths of the windows into which cluster labels of frames cut a video.

    Each label keeps its longest run, all of them if several are equally long, unless that is a
    single frame. From left to right, the stretches between join the longer of their neighbours,
    the left one if both are equally long.

    Args:
        labels: cluster of each frame.
    """
    runs = [(label, len(list(run))) for label, run in groupby(labels)]
    longest = {label: max(n for other, n in runs if other == label) for label in set(labels)}
    named = [label if 1 < n == longest[label] else None for label, n in runs for _ in range(n)]
    stretches = [(label, len(list(run))) for label, run in groupby(named)]
    result: list[tuple[int | None, int]] = []
    for (label, length), (following, ahead) in zip(
        stretches, [*stretches[1:], (None, 0)], strict=True
    ):
        before, last = result[-1] if result else (None, 0)
        if label is None:
            label = before if last >= ahead else following
        if result and label == before:
            result[-1] = label, last + length
        else:
            result.append((label, length))
    return [length for _, length in result]
