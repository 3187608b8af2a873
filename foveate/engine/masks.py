"""Masks and positions: what is padding, what each token sees, and where packed samples begin.

Shapes: `B` rows, `T` logical length of a forward, `K` columns of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import InputError


def real_positions(mask: Any, total: int) -> Tensor | None:
    """(B, total) positions that are neither padding nor hidden, or `None` if all are real.

    Args:
        mask: what the text model was given: 2-D, 4-D, a dict of those by kind of layer, or `None`.
        total: logical length, cached positions included.
    """
    sees = _square(mask)
    if sees is not None:
        mask = sees[..., :total].any(1)
        mask[:, -sees.shape[1] :] &= ~_hidden(sees[..., total - sees.shape[1] : total])
    elif isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None:
        return None
    real = mask[:, :total].bool()
    return None if bool(real.all()) else real


def seen_positions(mask: Any, past: int, length: int) -> Tensor | None:
    """(B or 1, T, T) which positions of a forward each of its positions sees, or `None` where it
    is those before it: masks that are built beforehand may hold blocks or prefixes.

    Args:
        mask: as in `real_positions`.
        past: cached positions.
        length: T.
    """
    sees = _square(mask)
    return None if sees is None else sees[:, :, past : past + length]


def numbered_positions(positions: Any, real: Tensor | None, length: int) -> Tensor | None:
    """(B, T) which positions make those after them go on by one; `None` if all do.

    What a caller hides in the middle takes a number of its own, or does not where positions are
    counts of what is not hidden, as in `generate`.

    Args:
        positions: (B or 1, T) position ids that the text model is given, if it is given plain ones.
        real: as `real_positions` finds it.
        length: T.
    """
    if real is None or not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    real = real[:, -length:]
    count = real.long().cumsum(1) - positions
    first = count.gather(1, real.to(torch.uint8).argmax(1, keepdim=True))
    counted = ((count == first) | ~real).all(1, keepdim=True)
    return real | ~counted


def from_first(positions: Tensor | None, real: Tensor | None, past: int) -> Tensor | None:
    """Positions counted from the first token of each row, where a model was given none and counts
    the padding before it too; `None` where they are so.

    Args:
        positions: (B or 1, T) positions of a forward; `None` where layers are told none.
        real: (B, past + T) positions of the sequence that are no padding; `None` for all.
        past: cached positions.
    """
    if positions is None or positions.dim() != 2 or real is None:
        return None
    column = real[:, past:].long().argmax(1, keepdim=True)
    positions = positions.expand(len(real), -1)
    counts_all = positions.gather(1, column) == column + past
    padding = torch.where(counts_all, real.long().argmax(1, keepdim=True), 0)
    return (positions - padding).clamp(min=0) if bool(padding.any()) else None


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
    return F.pad(jumps.cumsum(1), (1, 0))


def _square(mask: Any) -> Tensor | None:
    """(B or 1, T, K) bool of a mask that says what each position sees."""
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None or mask.dim() != 4:
        return None
    mask = mask[:, 0]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _hidden(sees: Tensor) -> Tensor:
    """(B or 1, T) which positions only see themselves be seen, while the next one goes on where
    they are. So it is with tokens that a caller hides; a sample of several in a row ends so as
    well, but the next one begins anew.

    Args:
        sees: (B or 1, T, T) what each position sees.
    """
    itself = torch.eye(sees.shape[1], dtype=torch.bool, device=sees.device)
    alone = ~(sees & ~itself).any(1)
    others = (sees & ~itself)[:, :-1]
    lost = others & ~sees[:, 1:]  # at most what a window leaves behind, the first that it saw
    first = others.to(torch.uint8).argmax(2, keepdim=True)
    lost = lost.scatter(2, first, False).any(2)
    alone[:, :-1] &= (others & sees[:, 1:]).any(2) & ~lost
    alone[:, -1:] = False
    return alone
