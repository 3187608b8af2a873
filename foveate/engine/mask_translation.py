"""Attention masks of the logical sequence, for the physical one. Shapes as in `layout`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.engine.layout import Layout
from foveate.engine.slots import Slots


def translate_mask(
    mask: Tensor | None,
    layout: Layout,
    slots: Slots,
    length: int,
    *,
    two_d: bool,
    width: int = 0,
    foreign: bool = False,
    causal: bool = True,
) -> Tensor | None:
    """The attention mask of the physical columns.

    Args:
        mask: what the text model built for the logical sequence: `None`, (B, K) for flash kernels,
            or (B or 1, H or 1, T, K), boolean (True attends) or additive.
        layout: (B, P) columns of this forward, the queries.
        slots: (B, S) cache slots after this forward, the keys.
        length: T, logical length of this forward.
        two_d: whether the kernel takes 2-D masks.
        width: columns the keys really have, where a static cache holds more than S.
        foreign: whether an earlier layer made the keys, of other columns than these.
        causal: whether queries see the keys before them alone where there is no mask, or all.

    Returns:
        `None` if the kernel's own rule is right, else (B, S) or (B, H or 1, P, S). Padding
        columns attend everywhere, so that they stay finite; nothing attends to them.
    """
    queries = layout.index.shape[1]
    unfilled = max(width - slots.count, 0)
    ragged = slots.ragged or layout.ragged
    # What queries would see by the kernel's own rule: slots that are not filled, or later keys.
    shown = unfilled and (queries == 1 or not causal)
    later = foreign and causal and queries > 1
    if mask is None and not (ragged or shown or later):
        return None
    keys = F.pad(slots.index, (0, unfilled), value=-1)
    if mask is not None:
        return _translated(mask, layout, slots, keys)
    if two_d or not causal:
        return keys >= 0 if two_d else (keys >= 0)[:, None, None]
    return _causal(layout, slots, keys, length)


def _translated(mask: Tensor, layout: Layout, slots: Slots, keys: Tensor) -> Tensor:
    """What the text model built, at the columns and at the (B, S) logical positions of the keys."""
    real = keys >= 0
    # Masks of sliding windows begin later than at position 0.
    offset = max(slots.length - mask.shape[-1], 0)
    real = keys >= offset if offset else real
    column = (keys - offset).clamp(min=0)
    if mask.dim() == 2:
        return mask.gather(1, column) * real.to(mask.dtype)
    physical = _picked(mask, layout.index.clamp(min=0), column)
    refuse = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    physical = physical.masked_fill(~real[:, None, None], refuse)
    if layout.ragged:
        allow = True if mask.dtype == torch.bool else 0.0
        physical = physical.masked_fill((layout.index < 0)[:, None, :, None], allow)
    return physical


def _picked(mask: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(B, H or 1, P, S) of a mask (B or 1, H or 1, T, K) at (B, P) rows and (B, S) columns."""
    batch = len(row)
    if mask.shape[0] == 1 and batch == 1:
        return mask.index_select(2, row[0]).index_select(3, column[0])
    rows = torch.arange(batch, device=mask.device)[:, None, None] if mask.shape[0] > 1 else 0
    return mask.movedim(1, -1)[rows, row[..., None], column[:, None]].movedim(-1, 1)


def translate_padding(mask: Tensor | None, layout: Layout) -> Tensor | None:
    """The padding mask of the physical columns, for layers that mix tokens into a running state.

    Args:
        mask: (B, T) real positions, as the text model made it; `None` for all.
        layout: (B, P) columns of this forward.

    Returns:
        (B, P), or `None` where every column is real.
    """
    if mask is None:
        return layout.index >= 0 if layout.ragged else None
    real = mask.gather(1, layout.index.clamp(min=0).to(mask.device))
    return real * (layout.index >= 0).to(real) if layout.ragged else real


def _causal(layout: Layout, slots: Slots, keys: Tensor, length: int) -> Tensor:
    """The mask of causal attention by logical position, where there was no mask to translate."""
    real = keys >= 0
    if layout.index.shape[1] == 1:
        return real[:, None, None]
    asked = layout.index + (slots.length - length)
    allowed = real[:, None] & (keys[:, None] <= asked[..., None])
    return (allowed | (layout.index < 0)[..., None])[:, None]
