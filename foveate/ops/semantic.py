"""Semantic tokens: a few tokens made of a grid by attention, and the grid recovered from them.

After Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View",
arXiv:2303.08685, and changsn/STViT-R @ b4a27a0, whose windows and shared norm these blocks have.
Shapes: `G` images, `V` tokens of a grid, `S` semantic tokens, `D` width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REACH = 3  # rows and columns by which the neighbourhood of a window is larger than the window
SCALE = 1e-5  # what attention and MLP count at first


class CrossBlock(nn.Module):
    """A pre-norm block in which queries attend to other tokens; one norm serves both.

    Args:
        width: D.
        heads: attention heads.
        eps: of the norms.
        shortcut: whether queries are added to what their attention makes of them.
    """

    def __init__(self, width: int, heads: int, eps: float = 1e-5, *, shortcut: bool = True) -> None:
        super().__init__()
        self.heads, self.shortcut = heads, shortcut
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale1 = nn.Parameter(torch.full((width,), SCALE))
        self.scale2 = nn.Parameter(torch.full((width,), SCALE))

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        """(G, N, D) of queries (G, N, D) and of what they attend to (G, M, D)."""
        normed = self.norm1(others)
        query = self._by_head(self.query(self.norm1(x)))
        key, value = map(self._by_head, self.key_value(normed).chunk(2, -1))
        scores = query @ key.mT * query.shape[-1] ** -0.5
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        made = self.scale1 * self.output(mixed)
        x = x + made if self.shortcut else made
        return x + self.scale2 * self.mlp(self.norm2(x))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def semantic_tokens(
    block: CrossBlock,
    x: Tensor,
    grid: tuple[int, int],
    side: int,
    window: int | None = None,
    centres: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """(G, side^2, D) semantic tokens in raster order.

    The largest values of each cell of the grid are a seed, unless there are some. The seeds of a
    window attend to each other and to all tokens in the window and around it.

    Args:
        block: the attention.
        x: (G, V, D) tokens of the grid.
        grid: (height, width), of whole windows.
        side: semantic tokens in a row and in a column, equally many in each window.
        window: side of a window in tokens; `None` for one window, the whole grid.
        centres: (side^2, D) what is added to the seeds; `None` for nothing.
        seeds: (G, side^2, D) semantic tokens, in raster order, to go on from.
    """
    tall, wide = (1, 1) if window is None else (grid[0] // window, grid[1] // window)
    cells = x.mT.unflatten(-1, grid)  # (G, D, height, width)
    if seeds is None:
        seeds = F.adaptive_max_pool2d(cells, (side, side)).flatten(2).mT
    if centres is not None:
        seeds = seeds + centres
    a, b = side // tall, side // wide
    begun = seeds.unflatten(1, (tall, a, wide, b)).transpose(2, 3).reshape(-1, a * b, x.shape[-1])
    around = _neighbourhoods(cells, (tall, wide), window)
    made = block(begun, torch.cat((begun, around), 1))
    made = made.view(len(x), tall, wide, a, b, -1).transpose(2, 3)
    return made.reshape(len(x), side * side, -1)


def _neighbourhoods(cells: Tensor, windows: tuple[int, int], window: int | None) -> Tensor:
    """(G T W, N, D) tokens of each window of (G, D, height, width), and around it."""
    if window is None:
        return cells.flatten(2).mT
    parts = []
    for size, count in zip(cells.shape[2:], windows, strict=True):
        length = min(window + REACH, size) if count > 1 else size
        starts = [i * (size - length) // max(count - 1, 1) for i in range(count)]
        parts.append([slice(start, start + length) for start in starts])
    rows, columns = parts
    found = [cells[:, :, row, column].flatten(2).mT for row in rows for column in columns]
    return torch.stack(found, 1).flatten(0, 1)


class SemanticTokens(nn.Module):
    """What an encoder learns to go on with semantic tokens, and to come back from them.

    Args:
        width: D.
        side: semantic tokens in a row and in a column.
        window: as in `semantic_tokens`.
        recover: whether to come back.
    """

    def __init__(self, width: int, side: int, window: int | None, recover: bool) -> None:
        super().__init__()
        heads = width // 64 if width % 64 == 0 else math.gcd(width, 4)
        self.side, self.window = side, window
        self.centres = nn.Parameter(torch.zeros(side * side, width))
        self.attend = CrossBlock(width, heads)
        self.recover = CrossBlock(width, heads) if recover else None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(G, side^2, D) semantic tokens of a grid of (G, V, D) tokens."""
        return semantic_tokens(self.attend, x, grid, self.side, self.window, self.centres)
