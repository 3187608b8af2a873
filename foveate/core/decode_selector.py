"""Decode selection: which visual tokens a decoding step attends to, chosen anew at every step.

Nothing is removed: what one step does not look at, the next one may.

Shapes: `B` rows, `N` visual tokens of a row, padded over the batch, `H` heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class DecodeChoice:
    """What one decoding step looked at.

    Args:
        attention: (B, N) attention of the new token to the visual tokens; 0 for padding.
        seen: (B, N) visual tokens that later layers attend to.
    """

    attention: Tensor
    seen: Tensor


class DecodeSelector(ABC):
    """A method with a step that acts on decoding (`Step(..., effects=("decode",))`)."""

    def selects_from(self, frames: int) -> bool:
        """Whether it acts on an image (1 frame) or a video of so many frames."""
        return True

    @abstractmethod
    def choose(self, attention: Tensor, real: Tensor, before: DecodeChoice | None) -> DecodeChoice:
        """Choose what later layers attend to.

        Args:
            attention: (B, H, N) attention of the new token to the visual tokens in the layer before
                the step, of a softmax over all it sees; 0 for padding.
            real: (B, N) which of them are no padding.
            before: what the last decoding step chose; `None` at the first one after a prompt with
                an image.
        """


@dataclass(frozen=True, eq=False)
class Candidates:
    """Visual tokens that decoding steps choose from; it lives in a cache layer.

    Args:
        columns: (B, N) their logical positions; -1 is padding.
        choice: the last choice.
    """

    columns: Tensor
    choice: DecodeChoice | None = None

    def rows(self, pick: Callable[[Tensor], Tensor]) -> Candidates:
        """Reorder, repeat or select rows."""
        choice = self.choice
        if choice is not None:
            choice = DecodeChoice(pick(choice.attention), pick(choice.seen))
        return Candidates(pick(self.columns), choice)

    def join(self, columns: Tensor) -> Candidates:
        """Watch more tokens; the next choice starts afresh."""
        return Candidates(torch.cat((self.columns, columns), 1))
