"""Matchings: which tokens merge into which.

Shapes: `G` images of equal size, `V` tokens of an image, `K` remaining, `d` width of a key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.ranking import highest, ranked


def match(keys: Tensor, r: int, special: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching (ToMe, arXiv:2210.09461): half of the rows lose the r most similar.

    The rows of the encoder belong to two sets in turn; each of the first is linked to the most
    similar of the second, and the r strongest links merge.

    Args:
        keys: (G, V, d) of unit length.
        r: tokens to merge, at most half of V.
        special: rows before the patches; they take turns too, but neither merge nor are merged
            into.

    Returns:
        (G, V - r) positions of what is left, in the release's order: the first set's rest, then the
        second set; and (G, V) where each token goes.
    """
    first = special % 2  # patches in even rows
    scores = keys[:, first::2] @ keys[:, 1 - first :: 2].transpose(1, 2)
    partner = highest(scores, 1.0)
    order = ranked(scores.amax(-1), 1.0)
    rest = order[:, r:]
    if special:
        rest = rest.sort(-1).values
    remaining, second = rest.shape[1], torch.arange(scores.shape[2], device=keys.device)
    second = second.expand(len(keys), -1)
    stays = torch.arange(remaining, device=keys.device).expand_as(rest)
    slot = keys.new_empty(keys.shape[:2], dtype=torch.long)
    slot[:, first::2] = (partner + remaining).scatter(1, rest, stays)
    slot[:, 1 - first :: 2] = second + remaining
    return torch.cat((rest * 2 + first, second * 2 + 1 - first), 1), slot


def match_every(keys: Tensor, every: int) -> tuple[Tensor, Tensor]:
    """Merge all tokens into the last of each run of `every`; a remainder is dropped.

    Args:
        keys: (G, V, d) of unit length.
        every: length of a run.

    Returns:
        As `match`, with V // every tokens left.
    """
    images, total = keys.shape[:2]
    index = torch.arange(every - 1, total, every, device=keys.device).expand(images, -1)
    slot = highest(keys @ keys[:, every - 1 :: every].transpose(1, 2), 1.0)
    slot = slot.scatter(1, index, torch.arange(total // every, device=keys.device).expand_as(index))
    slot[:, total // every * every :] = -1
    return index, slot
