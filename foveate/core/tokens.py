"""VisualTokens: what a method sees at its site in the stream.

Shapes: `G` images of equal token count, `V` visual tokens of an image, `D` hidden, `H` heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError


class Shape(NamedTuple):
    """How the visual tokens of an image or a video are laid out, before anything was removed.

    Args:
        total: number of tokens.
        grid: (height, width) of the token grid, of one frame in a video.
        frames: frames of a video that its tokens tell apart, all of this grid; 1 for an image.

    Tokens may follow the last frame, such as a newline.
    """

    total: int
    grid: tuple[int, int]
    frames: int = 1


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Visual tokens of images with equal token count, batch first.

    Args:
        features: returns (G, V, D) token values; called only when a method asks for `x`.
        index: (G, V) position of each token in its image's raster order; ascending, except after a
            method that orders its survivors, and inside an encoder after a merge.
        grid: (height, width) of the image's token grid, of one frame in a video, before anything
            was removed.
        rows: row of the batch that each image belongs to.
        signals: what the step declared in `needs`, by name.
        merged: (G, V) how many tokens of the image each stands for; `None` while all stand for
            one.
        special: inside an encoder, the class, distillation and register tokens that precede the
            patches; they are not among the V.
        site: where the step acts, as in reports: `vision:LAYER`, `pre_llm` or `llm:LAYER`.
        step: the step inside an encoder, as the method made it.
        frames: frames of a video, one after the other; 1 for an image.
        number: which of the method's steps acts, 0-based.
        quota: tokens of each image that the method's `count` grants it here; 0 in tokens made by
            hand.
        label: (G, V) what an earlier step of the same method has labelled each token with; `None`
            if it did not.
        valid: inside an encoder, (G, V) mask of real tokens; the rest is padding, where an earlier
            step of the same method has left images different numbers of tokens. `None` for all.
        learned: what `Method.learned` has made for the model, as it is now; `None` for methods that
            do not learn.
        memory: inside an encoder, what the method has noted for its later steps of the same pass
            over the same images; empty at first.
        total: tokens of each image before anything was removed; 0 in tokens made by hand.
    """

    features: Callable[[], Tensor]
    index: Tensor
    grid: tuple[int, int]
    rows: tuple[int, ...] = ()
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    merged: Tensor | None = None
    special: int = 0
    site: str = ""
    step: Any = None
    frames: int = 1
    number: int = 0
    quota: int = 0
    label: Tensor | None = None
    valid: Tensor | None = None
    learned: nn.Module | None = None
    memory: MutableMapping[str, Any] = field(default_factory=dict)
    total: int = 0

    @property
    def x(self) -> Tensor:
        """(G, V, D) token values at this site."""
        return self.features()

    @property
    def count(self) -> int:
        """Tokens of each image, V."""
        return self.index.shape[-1]

    @property
    def sizes(self) -> Tensor:
        """(G, V) how many tokens of the image each stands for, as floats."""
        if self.merged is None:
            return torch.ones(self.index.shape, device=self.index.device)
        return self.merged

    @property
    def frame(self) -> Tensor:
        """(G, V) frame of each token; tokens after the last frame belong to it."""
        return frame_of(self.index, self.grid, self.frames)

    @property
    def coordinates(self) -> Tensor:
        """(G, V, 2) row and column of each token in the grid of its image or frame.

        Tokens after the last frame are in rows below its grid.
        """
        height, width = self.grid
        cell = self.index if self.frames == 1 else self.index - self.frame * (height * width)
        return torch.stack((cell // width, cell % width), dim=-1)

    def signal(self, name: str) -> Tensor:
        """A declared signal.

        Raises:
            FoveateError: the method did not declare it in its step's `needs`.
        """
        if name not in self.signals:
            raise FoveateError(
                f"signal {name!r} was not declared in the step's needs; declared: "
                f"{sorted(self.signals)}"
            )
        return self.signals[name]


def frame_of(index: Tensor, grid: tuple[int, int], frames: int) -> Tensor:
    """Frame of each token.

    Args:
        index: raster positions.
        grid: (height, width) of a frame.
        frames: frames of the video; tokens after the last belong to it.
    """
    if frames == 1:
        return torch.zeros_like(index)
    return (index // (grid[0] * grid[1])).clamp(max=frames - 1)
