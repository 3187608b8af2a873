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
        closing: a module that takes the MLP's output and the states, and returns their sum; `None`
            where the layer adds them.
        kernel: the module of the attention that makes queries, keys and values and calls the
            kernel; empty where that is the attention itself.
        matrices: modules of the attention that make queries, keys and values: one for each, or one
            for all.
        norms: modules of the attention that norm queries and keys.
        norms_heads: whether these norm every head by itself.
        output: module of the attention that mixes its heads; only named where images lie in one
            sequence.
        flat: whether the attention takes (N, D) of the layer's (1, N, D).
    """

    norm1: str
    attention: str
    norm2: str
    mlp: str = "mlp"
    scale1: tuple[str, ...] = ()
    scale2: tuple[str, ...] = ()
    closing: str | None = None
    kernel: str = ""
    matrices: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    norms: tuple[str, ...] = ()
    norms_heads: bool = False
    output: str | None = None
    flat: bool = False

    @property
    def projections(self) -> tuple[str, ...]:
        """Modules of the attention that return queries and keys, the last that do: one for each, or
        one for queries, keys and values together.
        """
        return self.norms or (self.matrices if len(self.matrices) == 1 else self.matrices[:2])

    @property
    def modules(self) -> tuple[str, ...]:
        """All names, to check a layer against."""
        names = [self.norm1, self.attention, self.norm2, self.mlp, *self.scale1, *self.scale2]
        if self.closing is not None:
            names.append(self.closing)
        within = f"{self.attention}.{self.kernel}" if self.kernel else self.attention
        return (*names, *(f"{within}.{name}" for name in (*self.matrices, *self.norms)))

    def attend(
        self, layer: Any, hidden: Tensor, *, bias: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The first half of a layer: states after the attention.

        Args:
            layer: the layer.
            hidden: (B, N, D) states, or (N, D) or (1, N, D) of images in segments.
            bias: (N) what is added to the scores of each key, where the attention has segments and
                takes no mask.
            **kwargs: what the layer hands to its attention.
        """
        normed = getattr(layer, self.norm1)(hidden)
        attention = getattr(layer, self.attention)
        if bias is None:
            mixed = attention(normed.squeeze(0) if self.flat else normed, **kwargs)
            mixed = mixed if isinstance(mixed, Tensor) else mixed[0]
        else:
            assert self.output is not None
            parts = self._by_heads(attention, normed.flatten(0, -2))
            mixed = attend_segments(attention, parts, self.output, bias, kwargs)
        return hidden + _scaled(layer, self.scale1, mixed.view_as(normed))

    def _by_heads(self, attention: Any, normed: Tensor) -> tuple[Tensor, ...]:
        """(N, H, d) queries, and keys and values of as many heads as there are, without rotary
        positions.
        """
        made = [getattr(attention, name)(normed) for name in self.matrices]
        heads, groups = attention.num_heads, attention.num_key_value_groups
        parts = split(made[0], heads, groups) if len(made) == 1 else made
        counts = (heads, heads // groups, heads // groups)
        query, key, value = (
            part.unflatten(-1, (of, -1)) for part, of in zip(parts, counts, strict=True)
        )
        if self.norms:
            assert self.norms_heads  # as all do where images lie in one sequence
            query, key = (
                getattr(attention, name)(part)
                for name, part in zip(self.norms, (query, key), strict=True)
            )
        return query, key, value

    def attends(self, layer: Any) -> Any:
        """The module of a layer that makes queries, keys and values."""
        attention = getattr(layer, self.attention)
        return getattr(attention, self.kernel) if self.kernel else attention

    def feed(self, layer: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
        """The second half: states after the MLP.

        Args:
            layer: the layer.
            hidden: (B, N, D) states after the attention, or (N, D) or (1, N, D).
            **kwargs: what the layer is handed.
        """
        fed = getattr(layer, self.mlp)(getattr(layer, self.norm2)(hidden))
        if self.closing is not None:
            return getattr(layer, self.closing)(fed, hidden)
        return hidden + _scaled(layer, self.scale2, fed)


def split(made: Tensor, heads: int, groups: int) -> tuple[Tensor, ...]:
    """Queries, keys and values that one matrix makes.

    Args:
        made: (..., (H + 2 H / groups) d).
        heads: H.
        groups: query heads that share a head of keys and values.
    """
    width = made.shape[-1] // (heads + 2 * heads // groups)
    shared = width * heads // groups
    return made.split((width * heads, shared, shared), -1)


def _scaled(layer: Any, names: tuple[str, ...], states: Tensor) -> Tensor:
    for name in names:
        scale = getattr(layer, name)
        states = scale * states if isinstance(scale, Tensor | float) else scale(states)
    return states
