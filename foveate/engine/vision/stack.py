"""Stack: pictures of one pass through an encoder that have the same grid, handled together.

Shapes: `G` pictures, `V` visual tokens of each, `K` of them alive, `R` rows of the encoder that a
token has, `D` width of a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from foveate.core import Reduction
from foveate.families.rows import Picture

Grid = tuple[int, int]


@dataclass(eq=False)
class Stack:
    """Pictures with the same grid, and what is alive of them.

    A token's rows stay together: what happens to the token happens to the first row of every token,
    to the second, and so on.

    Args:
        pictures: number of each picture within the pass.
        grid: (height, width) of their visual tokens, of one frame in a video.
        rows: (G, V, R) rows of each token, among all rows of the pass.
        layout: from all tokens to those alive; `None` while all are.
        merged: (G, K) sizes, once a merge has happened.
        visible: (G, V, R) 1 for rows that others attend to, 0 for padding; `None` for all.
        frames: frames of each, one behind the other.
        begin: method -> tokens of a picture where the method began.
        kept: entry of a step -> (G, K) raster positions alive after it; -1 fills up pictures with
            fewer.
        readout: (G) raster position of a token that may not be removed, -1 for pictures without
            one; `None` if no picture has one.
    """

    pictures: tuple[int, ...]
    grid: Grid
    rows: Tensor
    frames: int = 1
    layout: Reduction | None = None
    merged: Tensor | None = None
    visible: Tensor | None = None
    begin: dict[int, int] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    readout: Tensor | None = None

    @property
    def total(self) -> int:
        """Tokens of each picture, V."""
        return self.rows.shape[1]

    @property
    def alive(self) -> int:
        """Tokens of each picture that are alive, K."""
        return self.total if self.layout is None else self.layout.kept

    @property
    def index(self) -> Tensor:
        """(G, K) raster positions alive; after a merge, not in their order."""
        if self.layout is not None:
            return self.layout.index
        everything = torch.arange(self.total, device=self.rows.device)
        return everything.expand(len(self.pictures), -1)

    @property
    def valid(self) -> Tensor | None:
        """(G, K) which of the tokens alive are any; others fill up. `None` for all."""
        return None if self.layout is None else self.layout.valid

    @property
    def lasting(self) -> Tensor | None:
        """(G) which of the tokens alive may not be removed, as in `readout`."""
        if self.readout is None:
            return None
        there = self.index == self.readout[:, None]
        return there.to(torch.uint8).argmax(1).masked_fill(~there.any(1), -1)

    def keep(self, tokens: Tensor, pictures: Sequence[Picture]) -> None:
        """Note tokens that may not be removed, by number among those of all pictures of a pass."""
        starts = [0, *accumulate(len(picture.rows) for picture in pictures)]
        spans = [range(starts[number], starts[number + 1]) for number in self.pictures]
        numbers = tokens.tolist()
        cells = [next((n - span.start for n in numbers if n in span), -1) for span in spans]
        if any(cell >= 0 for cell in cells):
            self.readout = torch.tensor(cells, device=self.rows.device)

    def rows_at(self, layout: Reduction | None) -> Tensor:
        """(G, K, R) rows of the tokens that a layout leaves."""
        if layout is None:
            return self.rows
        index = layout.index[..., None].expand(-1, -1, self.rows.shape[2])
        return self.rows.gather(1, index)

    def reduce(self, reduction: Reduction) -> None:
        """Note a reduction of the tokens alive."""
        layout = self.layout
        self.layout = reduction if layout is None else layout.then(reduction, self.total)
        if self.merged is not None or reduction.merges:
            self.merged = self.layout.sizes(self.total)

    def counts(self, layout: Reduction | None, *, merged: bool) -> Tensor | None:
        """(G, K, R) how many rows that others attend to each row stands for; `None` if all 1.

        Args:
            layout: the tokens alive.
            merged: whether merged tokens count as often as they have sources, or once.
        """
        seen = self.visible
        if layout is None:
            return seen
        seen = None if seen is None else layout.apply(seen)
        if layout.valid is not None:
            valid = layout.valid.float()[..., None].expand(-1, -1, self.rows.shape[2])
            seen = valid if seen is None else seen * valid
        if not merged:
            return None if seen is None else seen.gt(0).to(seen)
        if self.merged is None:
            return seen
        sizes = layout.sizes(self.total)[..., None].expand(-1, -1, self.rows.shape[2])
        return sizes if seen is None else seen * sizes

    def recover(self, x: Tensor, layout: Reduction | None, missing: float | None = None) -> Tensor:
        """Back to all tokens.

        Args:
            x: (G, K, R D) values of the tokens that a layout leaves.
            layout: the layout.
            missing: what dropped tokens get; `None` gives them the mean of what is left of their
                picture, so that a head which averages all rows sees that mean.
        """
        if layout is None:
            return x
        if missing is not None:
            return layout.recover(x, self.total, missing)
        counts = self.counts(layout, merged=True)
        if counts is None:
            counts = torch.ones(*x.shape[:2], 1, device=x.device)
        share = counts.to(x.dtype)[..., None]
        rows = x.unflatten(-1, (self.rows.shape[2], -1))
        mean = (rows * share).sum(1, keepdim=True) / share.sum(1, keepdim=True).clamp(min=1)
        return layout.recover(x, self.total, mean.expand(-1, -1, *rows.shape[2:]).flatten(2))


def stack(pictures: Sequence[Picture], device: torch.device) -> list[Stack]:
    """Stack the pictures of a pass that have the same grid."""
    shapes: dict[tuple[Grid, int], list[int]] = defaultdict(list)
    for number, picture in enumerate(pictures):
        shapes[picture.grid, picture.frames].append(number)
    return [
        Stack(
            tuple(numbers),
            grid,
            torch.stack([pictures[n].rows for n in numbers]).to(device),
            frames,
        )
        for (grid, frames), numbers in shapes.items()
    ]
