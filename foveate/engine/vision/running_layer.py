"""RunningLayer: the encoder layer that is running, as methods see it.

Shapes: `G` images of a group, `S` special rows before the patches, `V` visual tokens of an image,
`K` of them surviving, `R` rows of a token, `D` hidden, `H` heads, `N` rows of an image.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from foveate.core import LayerAttention, LayerShape
from foveate.core.attention import Kernel
from foveate.engine.plan import PlannedStep
from foveate.engine.vision.encoder_group import EncoderGroup, mean_of_rows
from foveate.engine.vision.patch_layout import PatchLayout
from foveate.errors import UnsupportedModelError
from foveate.families import Encoder, Family
from foveate.signals.cls_attention import class_row
from foveate.signals.rotary import rotated, rotated_class


class RunningLayer:
    """What is noted of the layer that is running, and what is made of it.

    Args:
        family: named where something is refused.
        encoder: the encoder.
        layout: the images of the pass, once they are known.
    """

    def __init__(self, family: Family, encoder: Encoder, layout: PatchLayout) -> None:
        self.family = family
        self.encoder = encoder
        self.layout = layout
        self.bias: Tensor | None = None  # (B, 1, 1, N) or (N) what keys' scores get
        self.scores: Tensor | None = None  # (B, H, N, N) the same of a kernel's, where relative
        self.input: Tensor | None = None
        self.normed: Tensor | None = None  # the same, as its attention is given it
        self.taps: dict[str, Tensor] | None = None  # what its projections have made
        self.rotary: Any = None  # of the rows of now
        self.turning = False  # whether its projections turn by those

    def kept(self) -> RunningLayer:
        """The layer as it is now, whatever the pass comes to."""
        twin = copy.copy(self)
        twin.layout = copy.copy(self.layout)
        return twin

    @property
    def reduced(self) -> bool:
        """Whether any token has been removed."""
        return self.layout.now.order is not None

    def kernel_mask(self, given: Tensor | None) -> Tensor | None:
        """What a kernel is handed as a mask, where it gets one of no other.

        Args:
            given: (B or 1, H or 1, N, N) what the layer hands it, for all rows.
        """
        mask = given
        if self.reduced:
            rows = self.layout.rows_of(self.layout.now).clamp(min=0)
            mask = self.bias
            if given is not None:
                mask = _between(given, rows) + (0 if self.bias is None else self.bias)
        self.scores = mask if self.encoder.relative else None
        return mask

    # -- for methods that attend

    def attention(
        self,
        planned: PlannedStep,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout: float,
        kernel: Kernel,
    ) -> LayerAttention:
        """What a method attends with, special rows first.

        Raises:
            UnsupportedModelError: the method reads whole grids, and the rows are no such grid.
        """
        assert self.normed is not None  # set before every attention
        rows, states = self.layout.groups[0].rows[0], self.normed
        if not self.reduced:
            rows, states = rows + self.encoder.trailing, self.encoder.specials_first(states)
            query, key, value = (
                self.encoder.specials_first(part.transpose(1, 2)).transpose(1, 2)
                for part in (query, key, value)
            )
        else:  # those of a token follow one another
            tokens = self.layout.groups[0].images.count
            rows = torch.arange(tokens * rows.shape[1], device=rows.device).view(tokens, -1)
            rows = rows + self.encoder.special
        of = self._shape(query.shape[1] * query.shape[3])
        grid = of.special + of.frames * of.grid[0] * of.grid[1]
        if planned.step.whole and (mask is not None or of.rows != grid):
            raise UnsupportedModelError(
                f"{planned.method.slug} computes attention by the grid of patches, but the "
                f"{of.rows} rows of encoder layer {planned.step.layer} of this "
                f"{self.family.model_type} are masked, or no grid of {of.grid[0]} x {of.grid[1]}"
            )
        return LayerAttention(query, key, value, mask, scaling, rows, states, of, kernel, dropout)

    def _shape(self, mixed: int) -> LayerShape:
        """What there is of each image in its attention, whose heads are so wide together."""
        assert self.normed is not None  # set before every attention
        of = self.layout.groups[0]
        height, width = of.images.shape.grid
        side = math.isqrt(of.rows.shape[2])
        return LayerShape.of(
            self.normed.shape[-2],
            self.encoder.special,
            (height * side, width * side),
            of.images.shape.frames,
            self.normed.shape[-1],
            mixed,
        )

    # -- signals

    def keys(self, of: EncoderGroup) -> Tensor:
        """(G, 1, H, K, d) keys of tokens: the mean of their rows'."""
        assert self.taps is not None  # only asked for between the halves of a layer
        _, key, *_ = self.encoder.projected([self.taps[name] for name in self.encoder.projections])
        key = mean_of_rows(self._of(key.detach(), of), of)
        heads = self.encoder.heads_of(key.shape[-1])
        return key.unflatten(-1, (heads, -1)).transpose(1, 2)[:, None]

    def class_attention(self, of: EncoderGroup) -> Tensor:
        """(G, 1, H, K) attention of the class token."""
        assert self.taps is not None  # only asked for between the halves of a layer
        made = [self.taps[part].detach() for part in self.encoder.projections]
        query, key, *_ = self.encoder.projected(made)
        return self._of_class(query[:, :1], key, of)

    @torch.no_grad()
    def ahead(self, layer: Any, hidden: Tensor, of: EncoderGroup) -> Tensor:
        """(B, 1, H, K) class-token attention of a layer that is about to run."""
        block, attention = self.encoder.block, self.encoder.attention(layer)
        assert block is not None  # checked in the plan
        normed = getattr(layer, block.norm1)(hidden)
        if len(block.matrices) == 1:
            made = getattr(attention, block.matrices[0])(normed)
            query, key, *_ = self.encoder.projected([made])
            query = query[:, :1]
        else:
            query, key = (getattr(attention, name) for name in block.matrices[:2])
            query, key = query(normed[:, :1]), key(normed)
        if block.norms:
            query, key = (
                getattr(attention, name)(part)
                for name, part in zip(block.norms, (query, key), strict=True)
            )
        return self._of_class(query, key, of)

    def _of_class(self, query: Tensor, key: Tensor, of: EncoderGroup) -> Tensor:
        """(B, 1, H, K) attention of the class token to tokens: to all their rows.

        Args:
            query: (B, 1, D) of the class token.
            key: (B, N, D).
            of: whose tokens.
        """
        special, heads = self.encoder.special, self.encoder.heads_of(query.shape[-1])
        query = rotated_class(query, self.rotary, heads, key.shape[1])
        key = rotated(key, self.rotary, heads)
        if not self.reduced:
            key = self.encoder.specials_first(key)
        bias = self.scores if self.encoder.relative else self.bias
        row = class_row(query, key, heads, special, bias).transpose(1, 2)
        row = torch.nn.functional.pad(row, (0, 0, special, 0))
        tokens = self._of(row if self.reduced else self.encoder.specials_apart(row), of)
        return tokens.unflatten(2, (-1, row.shape[2])).sum(2).transpose(1, 2)[:, None]

    def _of(self, states: Tensor, of: EncoderGroup) -> Tensor:
        """(G, K, R D) of a group's tokens, from states of now."""
        return self.layout.take(states, self.layout.groups.index(of))


def _between(given: Tensor, rows: Tensor) -> Tensor:
    """(B, H or 1, N', N') of (B or 1, H or 1, N, N), between (B, N') rows."""
    device = given.device
    image = torch.arange(given.shape[0], device=device)[:, None, None, None]
    head = torch.arange(given.shape[1], device=device)[:, None, None]
    rows = rows.to(device)
    return given[image, head, rows[:, None, :, None], rows[:, None, None, :]]
