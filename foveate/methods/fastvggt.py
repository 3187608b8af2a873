"""FastVGGT: attend with merged queries, keys and values, and give every token its result back.

Paper: Shen et al., "FastVGGT: Training-Free Acceleration of Visual Geometry Transformer",
arXiv:2509.02560. Reference code: mystorm16/FastVGGT @ a4dd237; nothing of it is copied.
Differs from the reference: each image is merged by its own similarities (there: the first of a
batch decides for all); a single image, which there would only have destinations, has one in each
cell, as in ToMe for diffusion (Bolya & Hoffman 2023, arXiv:2303.17604); cells that the border cuts
have one as well (there: the pattern shifts against the grid from row to row, and the last patches
have none; `as_released` does so); the random patch of a cell is drawn on the CPU, so that it is
the same on every device; ties go to the earlier row (there: unspecified). In VGGT each frame has
special tokens; encoders of transformers have them before the first frame only. `protect` is the
share that the paper calls salient, and `cell` the release's sx and sy, which are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from foveate.core import Approximate, LayerAttention, LayerShape, Step, VisualTokens, register
from foveate.core.fields import Natural, Range, UnitFloat
from foveate.ops.merge_map import merge_map, one_of_each_cell, strided


@register(
    "fastvggt",
    stage="vision",
    does="merges within attention only",
    paper="Shen et al. 2025, arXiv:2509.02560",
)
@dataclass(frozen=True)
class FastVGGT(Approximate):
    """Merge tokens around the attention of encoder layers: nothing is removed.

    The first frame of a video, one patch of each cell of the others, and special tokens stay what
    they are; other tokens merge into the most similar of these, by the layer's normed input. Of a
    single image, one patch of each cell stays. Attention runs on the plain means of queries, keys
    and values, after rotary positions. A merged token gets a copy of the result.

    `ratio=0.5, protect=0` is what ToMe for diffusion does to the attention of a layer.

    Args:
        ratio: share of all tokens to merge at most; with the default, all that may.
        cell: side of a cell in patches; `None` for no cells: then only the first frame of a video
            and special tokens are merged into.
        protect: share of all tokens, at equal distances, that attend for themselves.
        seed: of the draw of a patch in each cell, which is the same in every layer.
        as_released: let the cells shift where a side is odd, as the release does.
        layers: encoder layers that are computed so; `None` for all that are read.
        keep: `None`: nothing is removed.
        positions: without effect, as nothing is removed.

    Cost: one product of the tokens that may merge with those they may merge into, in each layer.
    """

    ratio: UnitFloat = 0.9
    cell: Annotated[int, Range(1, 2**16)] | None = 2
    protect: UnitFloat = 0.1
    seed: Natural = 33
    as_released: bool = False

    def attend(self, tokens: VisualTokens, layer: LayerAttention) -> Tensor:
        """Attention of merged rows, each row with the result of what it went into."""
        shape = layer.shape
        into, r = self.destinations(shape), int(self.ratio * shape.rows)
        if r == 0 or len(into) in (0, shape.rows):
            return layer.plain()
        copies = strided(shape.rows, self.protect)
        merged = merge_map(layer.states, into, r, copies)
        query, key, value = map(merged.merge, (layer.query, layer.key, layer.value))
        return merged.unmerge(layer.kernel(query, key, value, None))

    def attend_flops(self, step: Step, shape: LayerShape) -> int:
        """Similarities of what may merge, and attention of what is left."""
        into, r = self.destinations(shape), int(self.ratio * shape.rows)
        if r == 0 or len(into) in (0, shape.rows):
            return super().attend_flops(step, shape)
        copies = strided(shape.rows, self.protect)
        free = shape.rows - len(torch.cat((into, copies)).unique())
        left = free - min(r, free) + len(into) + len(copies)
        return 2 * shape.width * free * len(into) + 4 * shape.mixed * left**2

    def destinations(self, shape: LayerShape, chosen: Tensor | None = None) -> Tensor:
        """(T) rows that others merge into, ascending.

        Args:
            shape: what there is of an image.
            chosen: (F, rows, columns) which patch of each cell, of all frames but a video's first;
                `None` draws them.
        """
        size = shape.grid[0] * shape.grid[1]
        whole = size if shape.frames > 1 else 0
        first = torch.arange(shape.special + whole)
        if self.cell is None:
            return first
        if chosen is None:
            chosen = self.draw(shape)
        frames, sheared = len(chosen), self.as_released
        inside = one_of_each_cell(shape.grid, self.cell, chosen, sheared=sheared)
        start = shape.special + whole + size * torch.arange(frames)[:, None]
        return torch.cat((first, (start + inside).flatten()))

    def draw(self, shape: LayerShape) -> Tensor:
        """(F, rows, columns) a random patch of each cell, of all frames but a video's first."""
        assert self.cell is not None
        height, width = (
            side // self.cell if self.as_released else math.ceil(side / self.cell)
            for side in shape.grid
        )
        generator = torch.Generator().manual_seed(self.seed)
        frames = max(shape.frames - 1, 1)
        return torch.randint(self.cell**2, (frames, height, width), generator=generator)
