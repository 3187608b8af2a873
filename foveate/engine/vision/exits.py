"""Exits: tokens that leave the encoder early, and come back after its last layer.

Shapes: `G` images of a group, `V` tokens of each, `K` of them going on, `D` width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foveate.core import Reduction, VisualTokens
from foveate.engine.plan import PlannedStep
from foveate.ops.rows import put_rows


class Exits:
    """The states with which tokens of a group leave.

    Args:
        planned: the first step at which any can leave.
        tokens: what that step's method is shown, which are all tokens.
    """

    def __init__(self, planned: PlannedStep, tokens: VisualTokens) -> None:
        self._method, self._tokens = planned.method, tokens
        self._states = tokens.x

    def note(self, x: Tensor, layout: Reduction | None) -> None:
        """Note the states of tokens before some of them leave.

        Args:
            x: (G, K, D) states.
            layout: from all tokens to these.
        """
        index, valid = (None, None) if layout is None else (layout.index, layout.valid)
        self._states = x if index is None else put_rows(self._states, index, x, valid)

    def back(self, x: Tensor, layout: Reduction) -> Tensor:
        """(G, V, D) states of all tokens.

        Args:
            x: (G, K, D) states of those that go on.
            layout: from all tokens to these.
        """
        index = layout.index
        if layout.valid is not None:  # what pads is a token that has left
            own = self._states.gather(1, index[..., None].expand_as(x))
            x = torch.where(layout.valid[..., None], x, own)
        tokens = replace(self._tokens, features=lambda: self._states)
        return self._method.reinsert(tokens, index, x)
