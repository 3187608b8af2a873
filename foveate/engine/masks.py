"""Masks and positions: what is padding, what each token sees, and where packed samples begin.

Shapes: `B` rows, `T` logical length of a forward, `K` columns of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.transfer import Downloads, download
from foveate.errors import InputError


def real_positions(mask: Any, total: int, read: Downloads) -> Tensor | None:
    """(B, total) positions that are neither padding nor hidden by the caller, on the host; `None`
    for all.

    Args:
        mask: an attention mask: 2-D, 4-D, a dict of those by kind of layer, or `None`.
        total: logical length, cached positions included.
        read: copies on the host, of 2-D masks too.
    """
    sees = _square(mask)
    if sees is not None:
        mask = sees[..., :total].any(1)
        mask[:, -sees.shape[1] :] &= ~_hidden(sees[..., total - sees.shape[1] : total])
        (mask,) = download([mask])
    elif isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None:
        return None
    real = read.of(mask)[:, :total].bool()
    return None if bool(real.all()) else real


def present_positions(real: Tensor | None, visual: Tensor | None) -> Tensor | None:
    """(B, T) positions of a forward that count as tokens: real ones, and visual tokens that nobody
    sees because the caller hides them; `None` for all.

    Args:
        real: (B, T) positions that are neither padding nor hidden by the caller; `None` for all.
        visual: (B, T) placeholders of all images; `None` without images.
    """
    return real if real is None or visual is None else real | visual


def seen_positions(mask: Any, past: int, length: int) -> Tensor | None:
    """(B or 1, T, T) which positions of a forward each of its positions sees; `None` where it is
    those before it. Only a 4-D mask can say otherwise: it may hold blocks or prefixes.

    Args:
        mask: as in `real_positions`.
        past: cached positions.
        length: T.
    """
    sees = _square(mask)
    return None if sees is None else sees[:, :, past : past + length]


def numbered_positions(positions: Any, real: Tensor | None, length: int) -> Tensor | None:
    """(B, T) which tokens have a position id of their own; `None` if all do.

    A token that the caller hides in the middle of a prompt has one, unless position ids count only
    what is not hidden, as in `generate`.

    Args:
        positions: (B or 1, T) position ids of the text model; other shapes are ignored.
        real: (B, past + T) as `real_positions` returns it.
        length: T.
    """
    if real is None or not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    real = real[:, -length:]
    count = real.long().cumsum(1) - positions
    first = count.gather(1, real.to(torch.uint8).argmax(1, keepdim=True))
    counted = ((count == first) | ~real).all(1, keepdim=True)
    return real | ~counted


def from_first(positions: Tensor, real: Tensor | None, past: int, first: int = 0) -> Tensor | None:
    """Position ids counted from the first real token of each row; `None` where they are already.

    A model that is given no position ids counts the padding before that token too.

    Args:
        positions: (B or 1, T) position ids of a forward; other shapes are ignored.
        real: (B, past + T) as `real_positions` returns it.
        past: cached positions.
        first: the position of the first token of a prompt without padding.
    """
    if positions.dim() != 2 or real is None:
        return None
    column = real[:, past:].long().argmax(1, keepdim=True)
    positions = positions.expand(len(real), -1)
    counts_all = positions.gather(1, column) == column + past + first
    padding = torch.where(counts_all, real.long().argmax(1, keepdim=True), 0)
    return (positions - padding).clamp(min=first) if bool(padding.any()) else None


def samples(kwargs: Mapping[str, Any], read: Downloads) -> Tensor | None:
    """Which sample of its row each position is of, where a row holds several packed samples, on
    the host.

    As in transformers, if there is no mask, a sample begins wherever position ids do not grow by
    one. Not every text model looks at that: with a cache, only those with flash kernels do.

    Args:
        kwargs: arguments of the base model.
        read: copies on the host.

    Returns:
        (B, T) numbers; `None` where every row is one sample.

    Raises:
        InputError: samples are given as lengths, which only the attention kernel reads.
    """
    if kwargs.get("cu_seq_lens_q") is not None:
        raise InputError(
            "cu_seq_lens_q tells the attention kernel where packed samples begin, in lengths that "
            "are wrong once tokens are removed; leave it out and pass position_ids that begin "
            "anew with each sample, without an attention mask"
        )
    position_ids, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if position_ids is None or mask is not None:
        return None
    if position_ids.dim() == 3:  # on M-RoPE models, positions of text come first if they are given
        if position_ids.shape[0] != 4:
            return None
        position_ids = position_ids[0]
    jumps = read.of(position_ids).diff(dim=1) != 1
    if not bool(jumps.any()):
        return None
    return F.pad(jumps.cumsum(1), (1, 0))


def left_align(
    mask: Tensor, known: Sequence[int] | None = None, least: int = 0
) -> tuple[Tensor, Tensor]:
    """Columns at which a mask is true, aligned to the left.

    Args:
        mask: (B, T) mask.
        known: at how many in each row, if that is known.
        least: entries of each row, at least.

    Returns:
        (B, Q) columns, ascending, where short rows repeat their last one; and (B, Q) which entries
        are no repetition.
    """
    counts = mask.sum(1, keepdim=True)
    most = int(counts.max()) if known is None else max(known)
    number = torch.arange(max(most, least), device=mask.device)
    columns = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    return columns.gather(1, torch.minimum(number, (counts - 1).clamp(min=0))), number < counts


def _square(mask: Any) -> Tensor | None:
    """(B or 1, T, K) which columns each position sees, of a 4-D mask; `None` of other masks."""
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None or mask.dim() != 4:
        return None
    mask = mask[:, 0]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _hidden(sees: Tensor) -> Tensor:
    """(B or 1, T) which positions the caller hides: no other position sees them, and the next one
    sees what they saw. The last token of a packed sample is also seen by none, but the next sample
    sees nothing of it.

    Args:
        sees: (B or 1, T, T) what each position sees.
    """
    itself = torch.eye(sees.shape[1], dtype=torch.bool, device=sees.device)
    alone = ~(sees & ~itself).any(1)
    others = (sees & ~itself)[:, :-1]
    lost = others & ~sees[:, 1:]  # a window may lose one position: the first that it saw
    first = others.to(torch.uint8).argmax(2, keepdim=True)
    lost = lost.scatter(2, first, False).any(2)
    alone[:, :-1] &= (others & sees[:, 1:]).any(2) & ~lost
    alone[:, -1:] = False
    return alone
