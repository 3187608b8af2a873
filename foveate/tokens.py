"""VisualTokens: what a method is shown at its place in the stream.

Shapes: `G` images of equal token count, `V` visual tokens of an image, `D` hidden, `H` heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from foveate.errors import FoveateError


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Visual tokens of images with equal token count, batch first.

    Args:
        features: returns (G, V, D) token values; called only when a method asks for `x`.
        index: (G, V) position of each token in its image's raster order, ascending.
        grid: (height, width) of the image's token grid before anything was removed.
        rows: row of the batch that each image belongs to.
        signals: what the step declared in `needs`, by name.
    """

    features: Callable[[], Tensor]
    index: Tensor
    grid: tuple[int, int]
    rows: tuple[int, ...] = ()
    signals: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        """(G, V, D) token values at this place."""
        return self.features()

    @property
    def count(self) -> int:
        """Tokens of each image, V."""
        return self.index.shape[-1]

    @property
    def coordinates(self) -> Tensor:
        """(G, V, 2) row and column of each token in its image's grid."""
        from torch import stack

        width = self.grid[1]
        return stack((self.index // width, self.index % width), dim=-1)

    def signal(self, name: str) -> Tensor:
        """A declared signal.

        Raises:
            FoveateError: the method did not declare it in its step's `needs`.
        """
        if name not in self.signals:
            raise FoveateError(
                f"signal {name!r} was not declared in the step's needs; declared: "
                f"{sorted(self.signals)}"
            )
        return self.signals[name]
