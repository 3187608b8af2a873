"""Readout: no step removes a visual token that the next token of the text is read from.

Where a prompt ends in its image, the image's last token is the prompt's last. It survives every
step, at its own position. It takes the place of a token that the method would keep, so that counts
stay. Where the method merges it into another token, the merged token stands at its position.
Shapes: `G` images of equal size, `V` tokens of each, `K` survivors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core import Reduction
from foveate.errors import InputError

if TYPE_CHECKING:
    from foveate.engine.images import Image, ImageGroup
    from foveate.engine.plan import Plan


def check_readout(groups: Sequence[ImageGroup], plan: Plan) -> None:
    """Refuse features that lost a required token because the prompt was not known.

    Args:
        groups: the images of the forward.
        plan: the session's plan.

    Raises:
        InputError: a token that the next token of the text is read from was removed.
    """
    for group in groups:
        required = group.required
        if required is None or not any(map(_lost, group.images, required.tolist())):
            continue
        names = dict.fromkeys(s.method.slug for s in (*plan.vision, *plan.pre_llm))
        raise InputError(
            f"the prompt ends in its image, but {', '.join(names)} removed the image's last token "
            "in features that were made before the prompt was known; pass pixel_values to the "
            "model or to generate instead of mm_encoder_outputs, or end the prompt in text"
        )


def _lost(image: Image, token: int) -> bool:
    return image.required >= 0 and token < 0


def reduce_around(
    reduce: Callable[[int], Reduction],
    count: int,
    at: Tensor | None,
    ascending: bool = True,
) -> Reduction:
    """A method's reduction, changed so that one token of each image survives.

    Args:
        reduce: the method's reduction to a number of tokens.
        count: that number, K, at least 1.
        at: (G) which of the V tokens must survive, -1 for images without one; `None` for no image.
        ascending: whether survivors are to be in raster order, as outside an encoder.
    """
    reduction = reduce(count)
    if at is None:
        return reduction
    if count > 1 and not reduction.merges and reduction.valid is None and reduction.label is None:
        missing = (at >= 0) & (reduction.index != at[:, None]).all(1)
        if bool(missing.any()):  # the lowest of the ranking makes room
            fewer = reduce(count - 1).index
            missing &= (fewer != at[:, None]).all(1)
            if fewer.shape[1] == count - 1:
                around = torch.cat((fewer, at[:, None]), 1)
                index = torch.where(missing[:, None], around, reduction.index)
                reduction = replace(reduction, index=index)
    return surviving(reduction, at, ascending)


def spared(group: ImageGroup, reduction: Reduction) -> Iterator[tuple[ImageGroup, Reduction]]:
    """A reduction of a group in which required tokens survive, in parts of equal counts: where no
    token would survive at all, images keep their required one.
    """
    at = group.required
    if at is None or reduction.kept:
        yield group, surviving(reduction, at)
        return
    for read in (True, False):
        members = [i for i, token in enumerate(at.tolist()) if (token >= 0) is read]
        if members:
            part = group.pick(members)
            yield part, Reduction(at[members, None] if read else part.index[:, :0])


def surviving(reduction: Reduction, at: Tensor | None, ascending: bool = True) -> Reduction:
    """A reduction in which one token of each image survives, after all others if the method orders
    its survivors.

    If the method has merged the token, the merged token stands at its position. If it has dropped
    the token, the token takes the place of the survivor nearest to it in raster order.

    Args:
        reduction: the method's, with at least one survivor.
        at: (G) which of the V tokens must survive, -1 for images without one; `None` for no image.
        ascending: as in `reduce_around`.
    """
    if at is None:
        return reduction
    there = reduction.index == at[:, None]
    if reduction.valid is not None:
        there &= reduction.valid
    missing = (at >= 0) & ~there.any(1)
    if bool(missing.any()):
        reduction = _seated(reduction, missing.nonzero()[:, 0], at)
        if ascending and not reduction.ordered:
            return reduction.in_raster_order()
    return _last(reduction, at) if reduction.ordered else reduction


def _seated(reduction: Reduction, images: Tensor, at: Tensor) -> Reduction:
    """A reduction in which the required token of some images takes the place of a survivor."""
    index, at = reduction.index.clone(), at[images]
    distance = (index[images] - at[:, None]).abs()
    valid = None if reduction.valid is None else reduction.valid.clone()
    if valid is not None:
        distance = distance.masked_fill(~valid[images], torch.iinfo(distance.dtype).max)
    seat = distance.argmin(1)
    joined = torch.zeros_like(seat, dtype=torch.bool)
    weights, slot, share = reduction.weights, reduction.slot, reduction.share
    if weights is not None:
        most = weights[images, :, at].abs().max(1)
        joined = most.values > 0
        seat = torch.where(joined, most.indices, seat)
        weights = weights.clone()
        own = F.one_hot(at, weights.shape[2]).to(weights)
        weights[images, seat] = torch.where(joined[:, None], weights[images, seat], own)
    elif slot is not None and share is not None:
        given = slot[images, at]
        joined = given >= 0
        seat = torch.where(joined, given, seat)
        lost = ~joined[:, None] & (slot[images] == seat[:, None])
        slot, share = slot.clone(), share.clone()
        slot[images] = slot[images].masked_fill(lost, -1)
        slot[images, at] = seat
        share[images, at] = torch.where(joined, share[images, at], 1.0)
    residual = reduction.residual
    if residual is not None and reduction.removed is not None:  # it gives nothing any more
        gone = reduction.removed[images] == at[:, None]
        residual = residual.clone()
        residual[images] = residual[images].masked_fill(gone[:, None], 0.0)
    if valid is not None:  # where it is the row's padding already, the two change places
        filler = index[images] == at[:, None]
        index[images] = torch.where(filler, index[images, seat][:, None], index[images])
    index[images, seat] = at
    return replace(
        reduction,
        index=index,
        weights=weights,
        slot=slot,
        share=share,
        residual=residual,
        valid=valid,
    )


def _last(reduction: Reduction, at: Tensor) -> Reduction:
    """The same survivors, with the required one after all others."""
    order = (reduction.index == at[:, None]).to(torch.uint8).argsort(dim=1, stable=True)
    return reduction.reordered(order)
