"""Learning: methods with parameters, losses or budgets of their own in training.

Outside of training such a method is as any other: its `reduce` removes tokens. In training its
`reduce_softly` takes that place, which may keep every token and gate it, so that the choice itself
gets a gradient, and it may add to the model's loss.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.core.method import Method
from foveate.core.reduction import Reduction
from foveate.core.tokens import VisualTokens


@dataclass(eq=False)
class TrainingPass:
    """One forward of the model in training.

    Args:
        number: which of the step's passes it is, 0-based; see `Learning.passes`.
        losses: what methods add to the model's loss of this pass, scalars, by name.
        memory: what methods note for the rest of this pass, by their names.
    """

    number: int = 0
    losses: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, losses: Tensor) -> None:
        """Add the mean over all images of the batch to the model's loss.

        Args:
            name: of the loss.
            losses: (G) of some of the images; those given before under this name count too.
        """
        known = self.memory.setdefault(name, [])
        known.append(losses)
        self.losses[name] = torch.cat(known).mean()


class Learning(Method):
    """A method that does something else in training than in inference.

    It acts so in `model.train()` with gradients, and needs labels, because the model's loss is what
    its own losses are added to. Steps with the effect `training` act in training alone.
    """

    @property
    def passes(self) -> int:
        """Forwards of one training step over the same inputs, whose losses are averaged."""
        return 1

    @abstractmethod
    def reduce_softly(
        self, tokens: VisualTokens, count: int, training: TrainingPass
    ) -> Reduction | None:
        """What takes the place of `reduce` in training.

        Args:
            tokens: G images of V tokens.
            count: tokens of each that would survive in inference.
            training: the forward.

        Returns:
            A reduction to any number of tokens; `None` to leave all as they are.
        """


def gated(tokens: VisualTokens, gates: Tensor) -> Reduction:
    """Keep all tokens, each times its gate.

    Args:
        tokens: G images of V tokens, of which one step acts in raster order.
        gates: (G, V) from 0 to 1.
    """
    every = torch.arange(tokens.count, device=gates.device).expand_as(gates)
    return Reduction(every, slot=every, share=gates)


def soft_top(scores: Tensor, count: int) -> Tensor:
    """(G, V) gates in (0, 1) that sum to `count`: sigmoid(scores + t), the same t for an image.

    The gradient knows that t follows the scores: for a gate p it is diag(v) - v v' / sum(v) with
    v = p (1 - p).

    Args:
        scores: (G, V).
        count: between 0 and V, both excluded.
    """
    with torch.no_grad():
        exact = scores if scores.dtype == torch.float64 else scores.float()
        reach = 40.0  # beyond which a sigmoid is 0 or 1 to all practical purposes
        low = -exact.amax(1, keepdim=True) - reach
        high = -exact.amin(1, keepdim=True) + reach
        for _ in range(64):  # halves the interval each time
            shift = (low + high) / 2
            more = (exact + shift).sigmoid().sum(1, keepdim=True) < count
            low, high = torch.where(more, shift, low), torch.where(more, high, shift)
        p = (exact + shift).sigmoid()
        v = p * (1 - p)
        share = (v / v.sum(1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)).to(scores.dtype)
        shift = shift.to(scores.dtype)
    follows = (share * (scores - scores.detach())).sum(1, keepdim=True)  # 0, with a gradient
    return (scores + shift - follows).sigmoid()
