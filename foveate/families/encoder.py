"""The vision encoder of a model: its layers, and how they are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import UnsupportedModelError
from foveate.families.block import Block, split
from foveate.families.rows import EncoderImage

TOLD = frozenset(("spatial_shapes", "patch_attention_mask", "pixel_attention_mask", "noise"))
"""What encoders are told of images whose grids differ, or have padding after them or gaps."""

HEAD_WIDTHS = ("head_dim", "attention_head_size")


@dataclass(frozen=True)
class Encoder:
    """A vision encoder.

    Args:
        layers: its transformer layers.
        attention: the attention module of a layer.
        heads: attention heads, as the config says; see `heads_of`.
        class_token: whether row 0 is a class token.
        projections: modules of the attention whose outputs are queries and keys, (B, N, D) each, or
            one for queries, keys and values together.
        values: the module whose output are values, where each has its own.
        by_head: whether these outputs are (B, N, H, d).
        groups: query heads that share a head of keys and values.
        tower: the module that returns the states of all layers, as it ends before anything is made
            of them; needed to act inside the encoder.
        fed: the module around the tower that is called with pixels, where the tower is handed rows.
        block: how a layer is made; needed to act inside the encoder, and to count what it costs.
        extra: rows between the class token and the patches (registers, distillation token).
        trailing: special rows after the patches (detection tokens).
        head: a module that pools all rows by attention, with a `MultiheadAttention` within.
        packed: where the rows of all images lie in one sequence, or are padded to one length, says
            from the tower's arguments and `Family.side` which rows each image has, among those of
            all; `None` where each image is a row of a batch, and as large as the others.
        windows: says from the same where windows begin and end among all rows, in layers that have
            them; `None` where that is not known before layers are told.
        pixels: returns from the tower's arguments and `Family.side` the (V, P) pixels of each
            image's visual tokens; `None` where these follow from `pixel_values`, see `cuts`, or are
            not known.
        patches: says from what the entry is called with how many frames an image or a video has,
            and the height and width of each in patches; `None` where these follow from
            `pixel_values` and the config's `patch_size`. Read where each image is a row of a batch.
        padded: whether each image is a row of a batch, in which a mask hides padding.
        later: the first layer before which rows are merged, and what says from then on which rows
            each image has, as `packed` does; `None` where rows stay as they are.
        readers: modules within the tower that read rows after layers, and need all of them.
        taps: layers whose outputs the readers are handed as well, in a list.
        queries: rows that the tower puts in before all others once these layers have run.
        whole_after_layers: whether the tower takes all rows apart once its layers have run.
        returns_rows: whether what the tower returns are rows that no reader has read.
        films: whether the frames of a video are encoded together.
        maps_states: whether the model itself makes maps of all patches of the states between its
            layers, where they are asked for.
        runs_again: says whether layers run again with their hooks in the backward pass, as where
            the model checkpoints them.
        masks_layers: whether layers take an attention mask; else their attention does.
        mask: the name of that argument.
        masks_kernels: whether neither does, so that the kernel of the attention is handed one.
        relative: whether scores get a bias by relative position, within the mask of the kernel.
        by_place: names of what layers may be handed by place, after states.
        places: what layers are handed as the number of each row among all; without it, rows are
            numbered as they come. Empty where layers do not number rows.
        in_tuple: whether layers return a tuple, which begins with their states.
        shared_rotary: whether layers take the rotary positions of one image for all of a batch.
        scaling: what scores are multiplied with; 1 / sqrt(d) by default, d being the width of a
            head. Read where images are packed or padded.
        axes: parts of a head that are rotated each for itself, such as one for each axis.
    """

    layers: Sequence[nn.Module]
    attention: Callable[[Any], Any]
    heads: int
    class_token: bool
    projections: tuple[str, ...] = ("q_proj", "k_proj")
    values: str = "v_proj"
    by_head: bool = False
    groups: int = 1
    tower: Any = None
    fed: Any = None
    block: Block | None = None
    extra: int = 0
    trailing: int = 0
    head: Any = None
    packed: Callable[[Mapping[str, Any], int], list[EncoderImage]] | None = None
    windows: Callable[[Mapping[str, Any], int], Tensor] | None = None
    pixels: Callable[[Mapping[str, Any], int], list[Tensor]] | None = None
    patches: Callable[[Mapping[str, Any]], tuple[int, int, int]] | None = None
    padded: bool = False
    later: tuple[int, Callable[[Mapping[str, Any], int], list[EncoderImage]]] | None = None
    readers: tuple[Any, ...] = ()
    taps: tuple[int, ...] = ()
    queries: int = 0
    whole_after_layers: bool = False
    returns_rows: bool = True
    films: bool = False
    maps_states: bool = False
    runs_again: Callable[[], bool] | None = None
    masks_layers: bool = True
    mask: str = "attention_mask"
    masks_kernels: bool = False
    relative: bool = False
    by_place: tuple[str, ...] = ("attention_mask",)
    places: str = ""
    in_tuple: bool = False
    shared_rotary: bool = False
    scaling: float | None = None
    axes: int = 1

    @property
    def entry(self) -> Any:
        """The module that is called with pixels: around the tower, or the tower."""
        return self.tower if self.fed is None else self.fed

    @property
    def gridded(self) -> bool:
        """Whether the patches of all images of a batch fill one grid, in raster order: the encoder
        is told nothing of grids, padding or gaps.
        """
        forwards = (inspect.signature(type(of).forward) for of in (self.tower, self.entry))
        return all(TOLD.isdisjoint(forward.parameters) for forward in forwards)

    @cached_property
    def cuts(self) -> tuple[int, int] | None:
        """(height, width) of the adjacent patches that whole images are cut into, where each image
        is a row of a batch; `None` where that is not so, or not known.
        """
        known = inspect.signature(type(self.entry).forward).parameters
        convolutions = (m for m in self.entry.modules() if isinstance(m, nn.Conv2d))
        first = next(convolutions, None)
        whole = self.packed is None and self.patches is None and "pixel_values" in known
        if not whole or first is None:
            return None
        apart = first.kernel_size == first.stride and first.dilation == (1, 1)
        unpadded = first.padding in ("valid", (0, 0))
        height, width = first.kernel_size
        return (height, width) if apart and unpadded else None

    @property
    def leading(self) -> int:
        """Rows before the patches."""
        return int(self.class_token) + self.extra

    @property
    def special(self) -> int:
        """Rows that are no patches. Once tokens have been removed, all of them come first."""
        return self.leading + self.trailing

    @staticmethod
    def states_in(output: Any) -> Tensor:
        """The states in what a layer returns."""
        states: Tensor = output if isinstance(output, Tensor) else output[0]
        return states

    def output_of(self, states: Tensor) -> Any:
        """States as a layer returns them, without a map of its attention."""
        return (states, None) if self.in_tuple else states

    def specials_first(self, states: Tensor) -> Tensor:
        """(B, N, D) states of all rows, those of trailing special rows moved before the patches."""
        if not self.trailing:
            return states
        count = states.shape[1] - self.special
        leading, patches, trailing = states.split((self.leading, count, self.trailing), 1)
        return torch.cat((leading, trailing, patches), 1)

    def specials_apart(self, states: Tensor) -> Tensor:
        """(B, N, D) the same the other way round."""
        if not self.trailing:
            return states
        count = states.shape[1] - self.special
        leading, trailing, patches = states.split((self.leading, self.trailing, count), 1)
        return torch.cat((leading, patches, trailing), 1)

    @cached_property
    def head_width(self) -> int | None:
        """Width of a head, as the attention of layers says; `None` if it does not.

        Raises:
            UnsupportedModelError: it differs between layers.
        """
        widths = {
            next((getattr(of, name) for name in HEAD_WIDTHS if hasattr(of, name)), None)
            for of in map(self.attention, self.layers)
        }
        if len(widths) > 1:
            raise UnsupportedModelError(
                "attention of the encoder cannot be read: its heads are not equally wide in all "
                "layers; prune whole heads, or as much of each layer's"
            )
        return widths.pop()

    def heads_of(self, width: int) -> int:
        """Heads of a layer, which may have lost some.

        Args:
            width: of all its queries.
        """
        return self.heads if self.head_width is None else width // self.head_width

    def projected(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """(..., H d) queries, keys, and values if there are any, from what the projections return;
        keys and values that several heads share are repeated.
        """
        parts = outputs
        if len(outputs) == 1:
            made = outputs[0].shape[-1] * self.groups // (self.groups + 2)
            parts = split(outputs[0], self.heads_of(made), self.groups)
        query, key, *values = parts
        if self.by_head:
            query, key = query.flatten(-2), key.flatten(-2)
        heads = self.heads_of(query.shape[-1])
        return [query, *(self._repeated(part, heads) for part in (key, *values))]

    def _repeated(self, part: Tensor, heads_of_queries: int) -> Tensor:
        if self.groups == 1:
            return part
        heads = part.unflatten(-1, (heads_of_queries // self.groups, -1))
        return heads.repeat_interleave(self.groups, -2).flatten(-2)
