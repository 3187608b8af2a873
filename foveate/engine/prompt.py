"""The tokens that ask: whose attention ranks visual tokens.

In inference it is the last token of the prompt, or of each sample where several are packed. Where
labels are given it is the token before each supervised span, as each turn of a conversation ends
its prompt there.
Shapes: `B` rows, `T` logical length, `Q` asking tokens of a row, `G` images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError


@dataclass(frozen=True, eq=False)
class QueryTokens:
    """Asking tokens.

    Args:
        columns: (B, Q) logical columns, ascending; padding repeats some column.
        real: (B, Q) which of them ask; `None` for all.
        sample: (B, T) which sample of its row each position is of; `None` where rows are samples.
    """

    columns: Tensor
    real: Tensor | None = None
    sample: Tensor | None = None

    @classmethod
    def last(cls, batch: int, length: int, real: Tensor | None, trailing: int) -> QueryTokens:
        """The last token of each prompt.

        Args:
            batch: rows.
            length: T.
            real: (B, T) positions that are no padding; `None` for all.
            trailing: drafted tokens after the prompt.
        """
        if real is None:
            return cls(torch.full((batch, 1), length - 1 - trailing))
        order = torch.arange(length, device=real.device)
        return cls((real * order).amax(1, keepdim=True) - trailing)

    @classmethod
    def last_of_samples(cls, sample: Tensor) -> QueryTokens:
        """The last token of each sample.

        Args:
            sample: (B, T) which sample of its row each position is of.
        """
        asks = torch.nn.functional.pad(sample.diff(dim=1) != 0, (0, 1), value=True)
        return cls._where(asks, sample)

    @classmethod
    def before_spans(
        cls, supervised: Tensor, real: Tensor | None, sample: Tensor | None = None
    ) -> QueryTokens:
        """The token before each supervised span; none where a span begins its sample.

        Args:
            supervised: (B, T) positions with a label.
            real: (B, T) positions that are no padding; `None` for all.
            sample: (B, T) which sample of its row each position is of; `None` for one sample.
        """
        asks = ~supervised[:, :-1] & supervised[:, 1:]
        if real is not None:
            asks &= real[:, :-1]
        if sample is not None:
            asks &= sample[:, :-1] == sample[:, 1:]
        return cls._where(asks, sample)

    @classmethod
    def _where(cls, asks: Tensor, sample: Tensor | None) -> QueryTokens:
        """The tokens at which (B, T) is true."""
        width = max(int(asks.sum(1).max()), 1)
        columns = (~asks).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        return cls(columns, asks.gather(1, columns), sample)

    def of(self, rows: Tensor, ends: Tensor) -> Tensor:
        """(G, Q) which tokens ask about each of some images: those after it in its sample.

        Args:
            rows: (G) their rows.
            ends: (G) logical column of each one's last token, which may ask itself.
        """
        columns = self.columns[rows]
        if self.real is None:
            return torch.ones_like(columns, dtype=torch.bool)
        asks = self.real[rows] & (columns >= ends[:, None])
        if self.sample is not None:
            sample = self.sample[rows]
            asks &= sample.gather(1, columns) == sample.gather(1, ends[:, None])
        return asks


def samples(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which sample of its row each position is of, where several are packed after one another.

    As in transformers, without a mask a sample begins wherever positions do not go on by one. The
    caller has to know whether the text model looks at that: with a cache, only flash kernels do.

    Args:
        kwargs: what the base model is called with.

    Returns:
        (B, T) numbers, or `None` where every row is one sample.

    Raises:
        InputError: samples are told apart by lengths that only kernels see.
    """
    if kwargs.get("cu_seq_lens_q") is not None:
        raise InputError(
            "cu_seq_lens_q tells the attention kernel where packed samples begin, in lengths that "
            "do not hold once tokens are removed; leave it out and pass position_ids that begin "
            "anew with each sample, without an attention mask"
        )
    position_ids, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if position_ids is None or mask is not None:
        return None
    if position_ids.dim() == 3:  # on M-RoPE models, positions of text come first if they are given
        if position_ids.shape[0] != 4:
            return None
        position_ids = position_ids[0]
    jumps = position_ids.diff(dim=1) != 1
    if not bool(jumps.any()):
        return None
    return torch.nn.functional.pad(jumps.cumsum(1), (1, 0))


def starts(sample: Tensor) -> Tensor:
    """(B, T) the column at which the sample of each position begins."""
    order = torch.arange(sample.shape[1], device=sample.device).expand_as(sample)
    first = torch.nn.functional.pad(sample.diff(dim=1) != 0, (1, 0), value=True)
    return (order * first).cummax(1).values
