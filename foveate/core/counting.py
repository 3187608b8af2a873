"""Counting: how many tokens of an image survive each step, without running a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from foveate.core.method import Method
from foveate.core.step import Step


@dataclass
class TokenCount:
    """The tokens of one image on their way through a model.

    Args:
        tokens: how many it has now.
    """

    tokens: int
    _at_start: dict[int, int] = field(default_factory=dict, init=False)  # by number of a method
    _before: dict[int, int] = field(default_factory=dict, init=False)  # before its last step

    def take(self, method: Method, step: Step, number: int, method_number: int = 0) -> int:
        """Take a step, and return how many tokens survive it.

        Args:
            method: the method.
            step: the step, as `Method.steps` made it.
            number: which of the method's steps it is, 0-based.
            method_number: which of several methods it is.
        """
        found = self.tokens
        start = self._at_start.setdefault(method_number, found)
        if "reinsert" in step.effects:
            self.tokens = self._before[method_number]
        else:
            self.tokens = method.count(found, start, step, number)
        self._before[method_number] = found
        return self.tokens
