"""Merge maps: rows are merged for one computation, and each gets the result of what it went into.

Shapes: `B` images, `N` rows of each, `M` merged rows, `T` destinations, `P` protected rows, `S`
sources, `C` width of a row, `H` heads, `d` width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.ranking import highest, ranked
from foveate.core.transfer import upload

CHUNK = 5000  # sources that are compared with all destinations at a time


@dataclass(frozen=True, eq=False)
class MergeMap:
    """Which rows go together.

    Args:
        slot: (B, N) the merged row that each row goes into; -1 for one that is only copied.
        back: (B, N) the merged row whose result each row gets.
        copies: (P) rows that come once more, as they are, after all merged rows.
        merged: merged rows before the copies.
    """

    slot: Tensor
    back: Tensor
    copies: Tensor
    merged: int

    def merge(self, x: Tensor) -> Tensor:
        """(B, H, M, d) plain means of the rows of (B, H, N, d) that go together."""
        images, heads, rows, _ = x.shape
        flat = x.transpose(1, 2).flatten(2)
        bins = self.merged + 1  # the last for rows that are only copied
        slot = torch.where(self.slot < 0, self.merged, self.slot)
        slot = (slot + torch.arange(images, device=slot.device)[:, None] * bins).flatten()
        kind = torch.promote_types(x.dtype, torch.float32)  # or sums of many would stand still
        sums = flat.new_zeros(images * bins, flat.shape[-1], dtype=kind)
        sums = sums.index_add(0, slot, flat.reshape(images * rows, -1).to(kind))
        counts = slot.new_zeros(images * bins).index_add_(0, slot, torch.ones_like(slot))
        counts = counts.clamp(min=1)
        means = (sums / counts[:, None].to(sums)).to(x.dtype).view(images, bins, -1)
        means = torch.cat((means[:, : self.merged], flat.index_select(1, self.copies)), 1)
        return means.unflatten(2, (heads, -1)).transpose(1, 2)

    def unmerge(self, x: Tensor) -> Tensor:
        """(B, N, ...) from (B, M, ...): each row gets the result of what it went into."""
        index = self.back.view(*self.back.shape, *[1] * (x.dim() - 2))
        return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


@torch.no_grad()
def merge_map(states: Tensor, into: Tensor, r: int, copies: Tensor) -> MergeMap:
    """Merge the r sources that are most like a destination into it.

    Sources are all rows that are no destination. Those that are copied do not merge.

    Args:
        states: (B, N, C) by whose cosine similarity, rounded to bfloat16, rows are matched.
        into: (T) destinations, on the host; of those that tie, the first gets a source.
        r: sources to merge, at most; `merged_rows` says how many do.
        copies: (P) rows to copy, ascending, on the host.
    """
    images, total = states.shape[:2]
    every = torch.arange(total, device=states.device)
    free = torch.ones(total, dtype=torch.bool)
    free[into] = free[copies] = False
    at = upload(free.nonzero()[:, 0], states.device)  # the sources that may merge
    into, copies = upload(into, states.device), upload(copies, states.device)
    similarity, partner = _nearest(states, at, into)
    gone = min(r, len(at))
    order = ranked(similarity, 1.0) if gone < len(at) else every[: len(at)].expand(images, -1)
    goes, rest = at[order[:, :gone]], at[order[:, gone:]]
    left = rest.shape[1]
    slot = every.new_full((images, total), -1)
    slot.scatter_(1, rest, every[:left].expand_as(rest))
    slot[:, into] = left + every[: len(into)]
    slot.scatter_(1, goes, left + partner.gather(1, order[:, :gone]))
    merged = left + len(into)
    back = slot.clone()
    back[:, copies] = merged + every[: len(copies)]
    return MergeMap(slot, back, copies, merged)


def _nearest(states: Tensor, sources: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S) similarity to the most similar destination, and which that is, the first of ties."""
    rows = F.normalize(states.float(), dim=-1).to(torch.bfloat16)
    targets = rows[:, into].transpose(1, 2)
    found = []
    for part in sources.split(CHUNK):
        scores = rows[:, part] @ targets
        found.append((scores.amax(-1), highest(scores, 1.0)))
    if not found:  # nothing may merge
        none = states.new_zeros(len(states), 0)
        return none, none.long()
    similarity, partner = zip(*found, strict=True)
    return torch.cat(similarity, 1), torch.cat(partner, 1)


def strided(total: int, share: float, device: torch.device | None = None) -> Tensor:
    """(P) rows at equal distances: a share of all, rounded down.

    Args:
        total: rows, N.
        share: how many of them.
        device: where.
    """
    count = int(total * share)
    return torch.arange(count, device=device) * (total // max(count, 1))


def one_of_each_cell(
    grid: tuple[int, int], cell: int, chosen: Tensor, *, sheared: bool = False
) -> Tensor:
    """(F, n) position of one patch of each cell of each frame, ascending.

    Args:
        grid: (height, width) of a frame in patches.
        cell: side of a cell.
        chosen: (F, rows, columns) of cells: which patch of the cell, row by row; of a cell that
            the border cuts, the nearest there is.
        sheared: take rows as if they were as long as whole cells are, so that cells do not lie on
            the grid where its width is no multiple of them.
    """
    height, width = grid
    _, rows, columns = chosen.shape
    row = torch.arange(rows, device=chosen.device)[:, None] * cell + chosen // cell
    column = torch.arange(columns, device=chosen.device) * cell + chosen % cell
    if sheared:
        return (row * (columns * cell) + column).flatten(1).sort(-1).values
    position = row.clamp(max=height - 1) * width + column.clamp(max=width - 1)
    return position.flatten(1).sort(-1).values
