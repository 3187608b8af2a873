"""The vision encoder of a model: its layers, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveate.families.block import Block
from foveate.families.rows import EncoderImage


@dataclass(frozen=True)
class Encoder:
    """A vision encoder.

    Args:
        layers: its transformer layers.
        attention: the attention module of a layer.
        heads: attention heads.
        class_token: whether row 0 is a class token.
        projections: modules of the attention whose outputs are queries and keys, (B, N, D) each.
        tower: the module whose output is the encoder's; needed to act inside the encoder.
        block: how a layer is made; needed to act inside the encoder, and only given where each
            patch belongs to one visual token.
        extra: rows between the class token and the patches (registers, distillation token).
        head: a module that pools all rows by attention, with a `MultiheadAttention` within.
        packed: where the rows of all images lie in one sequence, or are padded to one length, says
            from the tower's arguments and `Family.side` which rows each image has, among those of
            all; `None` where each image is a row of a batch, and as large as the others.
        padded: whether each image is a row of a batch, in which a mask hides padding.
        readers: modules within the tower that read rows after layers, and need all of them.
        returns_rows: whether what the tower returns are rows that no reader has read.
        masks_layers: whether layers take an attention mask; else their attention does.
        scaling: what scores are multiplied with; 1 / sqrt(d) by default, d being the width of a
            head. Read where images are packed or padded.
        axes: parts of a head that are rotated each for itself, such as one for each axis.
    """

    layers: Sequence[nn.Module]
    attention: Callable[[Any], Any]
    heads: int
    class_token: bool
    projections: tuple[str, ...] = ("q_proj", "k_proj")
    tower: Any = None
    block: Block | None = None
    extra: int = 0
    head: Any = None
    packed: Callable[[Mapping[str, Any], int], list[EncoderImage]] | None = None
    readers: tuple[Any, ...] = ()
    returns_rows: bool = True
    masks_layers: bool = True
    padded: bool = False
    scaling: float | None = None
    axes: int = 1

    def by_rows(self, projected: Tensor) -> Tensor:
        """(..., H d) queries or keys of a row, from what a projection makes, or a norm of heads:
        (B, N, heads, d). Keys that heads share are repeated.
        """
        if projected.dim() < 4:
            return projected
        return projected.repeat_interleave(self.heads // projected.shape[2], 2).flatten(2)

    @property
    def special(self) -> int:
        """Rows before the patches."""
        return int(self.class_token) + self.extra
