"""Attention of grid tokens to their neighbours: the grid in tiles, dense within.

The queries of a tile need the keys of the tile and of half a window around it, so the cost grows
with the window and not with the image.

Shapes: `G` images, `H` heads, `V` tokens of an image, `d` head width, `K` keys that tokens see
besides, `n` tiles of a frame, `q` queries and `k` keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Where tokens lie, and how far they see.

    Args:
        frames: frames of a video, one after the other; 1 for an image.
        height: rows of a frame.
        width: columns of a frame.
        window: odd side of the neighbourhood; half of it, rounded down, in each direction.
    """

    frames: int
    height: int
    width: int
    window: int

    @property
    def cells(self) -> int:
        """Places of all frames."""
        return self.frames * self.height * self.width

    @property
    def reach(self) -> int:
        """How far a token sees in each direction."""
        return self.window // 2

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile: the halo about a tile is at most as large as the tile."""
        side = max(4 * self.reach, 1)
        return min(side, self.height), min(side, self.width)

    @property
    def halo(self) -> tuple[int, int]:
        """Rows and columns on each side of a tile whose keys it needs."""
        rows, columns = self.tile
        return self.reach * (rows < self.height), self.reach * (columns < self.width)

    @property
    def tiles(self) -> tuple[int, int]:
        """How many tiles there are, down and across; the last may reach beyond the frame."""
        rows, columns = self.tile
        return -(-self.height // rows), -(-self.width // columns)

    def pairs(self, common: int = 0) -> int:
        """Query-key pairs that are computed, those that a mask hides included.

        Args:
            common: keys that every token sees besides.
        """
        (rows, columns), (up, left), (down, across) = self.tile, self.halo, self.tiles
        keys = (rows + 2 * up) * (columns + 2 * left) + common
        return self.frames * down * across * rows * columns * keys

    def cut(self, x: Tensor, halo: tuple[int, int] = (0, 0), fill: float = 0.0) -> Tensor:
        """(A, cells, c) as (A frames n, q, c), or (A frames n, k, c) with a halo."""
        x = x.unflatten(1, (self.frames, self.height, self.width)).flatten(0, 1)
        (rows, columns), (up, left), (down, across) = self.tile, halo, self.tiles
        right, below = across * columns - self.width + left, down * rows - self.height + up
        x = F.pad(x, (0, 0, left, right, up, below), value=fill)
        x = x.unfold(1, rows + 2 * up, rows).unfold(2, columns + 2 * left, columns)
        return x.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(0, 2)

    def join(self, x: Tensor) -> Tensor:
        """(A frames n, q, c) as (A, cells, c)."""
        (rows, columns), (down, across) = self.tile, self.tiles
        x = x.unflatten(1, (rows, columns)).unflatten(0, (-1, down, across)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)[:, : self.height, : self.width]
        return x.flatten(1, 2).unflatten(0, (-1, self.frames)).flatten(1, 2)

    def near(self, device: torch.device) -> Tensor:
        """(q, k) which keys of a tile lie in the window of which query."""
        sides = [
            (torch.arange(side, device=device)[:, None]
             - torch.arange(side + 2 * halo, device=device) + halo).abs() <= self.reach
            for side, halo in zip(self.tile, self.halo, strict=True)
        ]  # fmt: skip
        return (sides[0][:, None, :, None] & sides[1][None, :, None]).flatten(2).flatten(0, 1)


def window_attention(
    image: tuple[Tensor, Tensor, Tensor],
    common: tuple[Tensor, Tensor, Tensor],
    grid: Grid,
    scale: float,
    index: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Softmax attention to the window around each token, later tokens included, and to common keys.

    Args:
        image: queries, keys and values of the tokens, (G, H, V, d) each.
        common: keys and values (G, H, K, d), and which of them each token sees, (G, V, K) bool.
        grid: where tokens lie, and how far they see.
        scale: factor of the scores.
        index: (G, V) raster place of each token, unique; `None` if they fill the grid.
        seen: (G, V) which tokens others may attend to; `None` for all.

    Returns:
        (G, H, V, d).
    """
    (q, k, v), (common_k, common_v, may) = image, common
    images, heads = q.shape[:2]
    seen = torch.ones(q.shape[::2], dtype=torch.bool, device=q.device) if seen is None else seen
    if index is not None:
        q, k, v = (_spread(x, index[:, None].expand(-1, heads, -1), grid.cells, 0) for x in image)
        seen = _spread(seen[..., None], index, grid.cells, 0)[..., 0]
        may = _spread(may, index, grid.cells, 1)
    out = F.scaled_dot_product_attention(
        _tiles(q, grid),
        _tiles(k, grid, common_k),
        _tiles(v, grid, common_v),
        _visible(grid, may.to(q.dtype), seen.to(q.dtype))[:, None],
        scale=scale,
    )
    out = out.unflatten(0, (images, -1)).transpose(1, 2)
    out = grid.join(out.flatten(0, 2)).unflatten(0, (images, heads))
    if index is None:
        return out
    return out.gather(2, index[:, None, :, None].expand(-1, heads, -1, out.shape[3]))


def _tiles(x: Tensor, grid: Grid, common: Tensor | None = None) -> Tensor:
    """(G, H, cells, d) as the queries (G frames n, H, q, d) of each tile; or, with (G, H, K, d)
    common keys or values, as those and the tile's own, (G frames n, H, K + k, d).
    """
    images, heads = x.shape[:2]
    x = grid.cut(x.flatten(0, 1), (0, 0) if common is None else grid.halo)
    x = x.unflatten(0, (images, heads, -1)).transpose(1, 2)
    if common is not None:
        x = torch.cat((common[:, None].expand(-1, x.shape[1], -1, -1, -1), x), dim=3)
    return x.flatten(0, 1)


def _visible(grid: Grid, may: Tensor, seen: Tensor) -> Tensor:
    """(G frames n, q, K + k) what each query of a tile sees.

    Args:
        grid: the grid.
        may: (G, cells, K) 1 where a cell sees a common key.
        seen: (G, cells) 1 where others may attend to a cell.
    """
    tokens = grid.cut(seen[..., None], grid.halo).bool().transpose(1, 2)
    window = grid.near(seen.device) & tokens
    mask = torch.cat((grid.cut(may, fill=1.0).bool(), window), dim=2)
    # Cells without a token may see nothing; they look everywhere, and nobody reads them.
    return mask | ~mask.any(-1, keepdim=True)


def _spread(x: Tensor, index: Tensor, cells: int, fill: int) -> Tensor:
    """(..., cells, d) of (..., V, d) at (..., V) cells; others hold `fill`."""
    whole = x.new_full((*x.shape[:-2], cells, x.shape[-1]), fill)
    return whole.scatter(-2, index[..., None].expand_as(x), x)
