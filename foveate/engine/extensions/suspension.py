"""Suspended tokens: taken out before one decoder layer, back before another.

In between they are as good as removed, in the cache too; each layer's slots say what it saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.engine.extensions.base import Extension
from foveate.engine.images import ImageGroup
from foveate.engine.layout import Layout
from foveate.engine.plan import Plan, PlannedStep


class Suspension(Extension):
    """Takes tokens out before one decoder layer, and brings them back before another."""

    def __init__(self, forward: Any, plan: Plan) -> None:
        super().__init__(forward, plan)
        self._suspended: dict[int, Suspended] = {}  # method -> the forward as it was

    def before_step(self, planned: PlannedStep, hidden: Tensor) -> Tensor | None:
        """Remember the forward if tokens are to come back; bring back those that are due."""
        if "reinsert" in planned.step.effects:
            return self._suspended.pop(planned.method_number).back(self.forward, planned, hidden)
        if planned.suspends:
            self._suspended[planned.method_number] = Suspended.of(self.forward, hidden)
        return None


@dataclass(frozen=True, eq=False)
class Suspended:
    """A forward as it was before tokens were suspended.

    Args:
        groups: images with tokens left.
        layout: physical columns.
        tokens: real tokens of each row.
        hidden: (B, P, D) states.
    """

    groups: list[ImageGroup]
    layout: Layout
    tokens: list[int]
    hidden: Tensor

    @classmethod
    def of(cls, forward: Any, hidden: Tensor) -> Suspended:
        """Remember a forward before a step takes tokens out."""
        return cls(forward.groups, forward.layout, forward.tokens, hidden)

    def back(self, forward: Any, planned: PlannedStep, hidden: Tensor) -> Tensor:
        """Bring the suspended tokens back.

        Args:
            forward: the forward, which gets its former columns.
            planned: the step at which they come back.
            hidden: (B, P', D) states of those that were not suspended.

        Returns:
            (B, P, D) states of all.
        """
        states = self._merged(forward.layout, hidden)
        for after in forward.groups:
            before = self._before(after)
            at = forward.row_index(before), forward.columns_of(before, self.layout)
            now = hidden[forward.row_index(after), forward.columns_of(after, forward.layout)]
            assert before.columns is not None
            assert after.columns is not None
            kept = torch.searchsorted(before.columns.contiguous(), after.columns.contiguous())
            tokens = before.visual_tokens(planned, lambda at=at: self.hidden[at])  # type: ignore[misc]
            states = states.index_put(at, planned.method.reinsert(tokens, kept, now))
        noted = {image.number: image.kept for group in forward.groups for image in group.images}
        forward.groups = [group.with_kept(noted).noted(planned.entry) for group in self.groups]
        forward.layout, forward.tokens = self.layout, self.tokens
        return states

    def _merged(self, layout: Layout, hidden: Tensor) -> Tensor:
        """States of now where there are any, else as they were."""
        if layout is self.layout:
            return hidden
        index = self.layout.index.contiguous()
        where = torch.searchsorted(index, layout.index.clamp(min=0).contiguous())
        rows = torch.arange(len(where), device=where.device)[:, None].expand_as(where)
        spare = F.pad(self.hidden, (0, 0, 0, 1))  # a column for what is padding now
        where = where.masked_fill(layout.index < 0, self.hidden.shape[1])
        return spare.index_put((rows, where), hidden)[:, :-1]

    def _before(self, after: ImageGroup) -> ImageGroup:
        """The same images, before."""
        for group in self.groups:
            if after.numbers[0] in group.numbers:
                return group.pick([group.numbers.index(number) for number in after.numbers])
        raise AssertionError("images of a group stay together")
