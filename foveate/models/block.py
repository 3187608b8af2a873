"""Block: how an encoder layer is made, by the names of its modules.

Every encoder here is pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). With the names, a
layer can be run in two halves, so that tokens can be removed in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Names of the modules of a pre-norm encoder layer.

    Args:
        norm1: norm before the attention.
        attention: attention with `q_proj` and `k_proj`; takes hidden states and an attention mask,
            and returns a tuple.
        norm2: norm before the MLP.
        mlp: the MLP.
        scale1: what the attention's output passes on its way to the sum: layer scale, dropout.
        scale2: the same for the MLP's output.
    """

    norm1: str
    attention: str
    norm2: str
    mlp: str = "mlp"
    scale1: tuple[str, ...] = ()
    scale2: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """All names, to check a layer against."""
        names = (self.norm1, self.attention, self.norm2, self.mlp, *self.scale1, *self.scale2)
        return (*names, f"{self.attention}.q_proj", f"{self.attention}.k_proj")

    def attend(self, layer: Any, hidden: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        """The first half of a layer: (B, N, D) states after the attention."""
        normed = getattr(layer, self.norm1)(hidden)
        mixed = getattr(layer, self.attention)(normed, attention_mask=mask, **kwargs)[0]
        for name in self.scale1:
            mixed = getattr(layer, name)(mixed)
        return hidden + mixed

    def feed(self, layer: Any, hidden: Tensor) -> Tensor:
        """The second half: (B, N, D) states after the MLP."""
        fed = getattr(layer, self.mlp)(getattr(layer, self.norm2)(hidden))
        for name in self.scale2:
            fed = getattr(layer, name)(fed)
        return hidden + fed
