"""Renumbering: positions close up where tokens were removed, as if these had never been there.

Shapes: `B` batch, `T` logical length of a forward, `P` physical columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.engine.prompt import starts
from foveate.engine.state import Prompt


@dataclass(frozen=True, eq=False)
class Renumbering:
    """What is taken off the positions of a forward.

    Args:
        shift: (B, T) off each position.
        total: (B, 1) off those after the forward.
    """

    shift: Tensor
    total: Tensor

    @classmethod
    def of(cls, gone: Tensor, prompt: Prompt, earlier: Renumbering | None) -> Renumbering:
        """Close gaps.

        Args:
            gone: (B, T) positions that are removed.
            prompt: what the forward is about.
            earlier: what was taken off before in this forward, if anything was.
        """
        count = (gone if prompt.numbered is None else gone & prompt.numbered).long()
        closed = count.cumsum(1)
        shift, total = closed - count, closed[:, -1:]
        if prompt.sample is not None:  # each sample has positions of its own
            shift = shift - shift.gather(1, starts(prompt.sample))
        if earlier is not None:
            shift, total = earlier.shift + shift, earlier.total + total
        return cls(shift, total)


def places_in_samples(sample: Tensor | None, columns: Tensor) -> Tensor | None:
    """(B, P) places of columns in packed samples, for kernels that tell these apart so.

    Args:
        sample: (B, T) sample of each position; `None` where rows are samples.
        columns: (B, P) positions.
    """
    if sample is None:
        return None
    sample = sample.gather(1, columns)
    return torch.arange(sample.shape[1], device=sample.device) - starts(sample)
