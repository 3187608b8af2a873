"""Block: how an encoder layer is made, by the names of its modules.

Every encoder here is pre-norm: x + attention(norm(x)), then x + mlp(norm(x)), where norms may
follow too. With the names, a layer can be run in two halves, so that tokens can be removed in
between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveate.families.segments import attend_segments


@dataclass(frozen=True)
class Block:
    """Names of the modules of a pre-norm encoder layer.

    Args:
        norm1: norm before the attention.
        attention: attention, which takes normed states and keyword arguments.
        norm2: norm before the MLP.
        mlp: the MLP.
        scale1: what the attention's output passes on its way to the sum: layer scale (a module, or
            a parameter to multiply with), dropout, a norm.
        scale2: the same for the MLP's output.
        projections: modules of the attention that make queries and keys, or norm them: one for
            each, or one for queries, keys and values together.
        output: module of the attention that mixes its heads.
    """

    norm1: str
    attention: str
    norm2: str
    mlp: str = "mlp"
    scale1: tuple[str, ...] = ()
    scale2: tuple[str, ...] = ()
    projections: tuple[str, ...] = ("q_proj", "k_proj")
    output: str | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """All names, to check a layer against."""
        names = (self.norm1, self.attention, self.norm2, self.mlp, *self.scale1, *self.scale2)
        return (*names, *(f"{self.attention}.{name}" for name in self.projections))

    def attend(
        self, layer: Any, hidden: Tensor, *, bias: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The first half of a layer: states after the attention.

        Args:
            layer: the layer.
            hidden: (B, N, D) states, or (N, D) of images in segments.
            bias: (N) what is added to the scores of each key, where the attention has segments and
                takes no mask.
            **kwargs: what the layer hands to its attention.
        """
        normed = getattr(layer, self.norm1)(hidden)
        attention = getattr(layer, self.attention)
        if bias is None:
            mixed = attention(normed, **kwargs)
            mixed = mixed if isinstance(mixed, Tensor) else mixed[0]
        else:
            assert self.output is not None
            mixed = attend_segments(attention, self.projections, self.output, normed, bias, kwargs)
        return hidden + _scaled(layer, self.scale1, mixed)

    def feed(self, layer: Any, hidden: Tensor) -> Tensor:
        """The second half: states after the MLP."""
        fed = getattr(layer, self.mlp)(getattr(layer, self.norm2)(hidden))
        return hidden + _scaled(layer, self.scale2, fed)


def _scaled(layer: Any, names: tuple[str, ...], states: Tensor) -> Tensor:
    for name in names:
        scale = getattr(layer, name)
        states = scale * states if isinstance(scale, Tensor) else scale(states)
    return states
