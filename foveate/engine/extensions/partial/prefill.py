"""Decoder layers in which visual tokens cost less: fewer keys, heads and neurons; none is removed.

The layer's own weights, sliced, do the work that is left; nothing is computed to be masked.

Shapes: `B` batch, `P` physical columns, `S` cache slots, `G` images of equal size, `V` visual
tokens of each, `N` text tokens of a row, `H` query heads, `d` head width, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.core import PartialCompute
from foveate.engine.extensions.partial.window import Grid, window_attention
from foveate.engine.layout import take
from foveate.engine.masks import left_align
from foveate.engine.replaced_forward import has_own_forward
from foveate.families import Family
from foveate.families.decoder_layer import heads_of
from foveate.signals.layer_view import rotary_function

LAYERS = frozenset(
    {
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen2VLDecoderLayer",
        "Qwen2_5_VLDecoderLayer",
        "Qwen3DecoderLayer",
        "Qwen3VLTextDecoderLayer",
    }
)
"""Decoder layers of one form: norm, attention, norm, gated MLP, two residual sums."""
_ATTENTION = tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v", "o"))
_MLP = tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))


@dataclass(frozen=True, eq=False)
class Images:
    """Visual tokens of images with one grid.

    Args:
        rows: (G, 1) row of the batch of each image.
        columns: (G, V) physical columns.
        index: (G, V) surviving raster positions; `None` if all are.
        frames: frames of a video, 1 for images.
        grid: (height, width) of a frame.
        seen: (G, V) which tokens the caller has not hidden; `None` for all.
    """

    rows: Tensor
    columns: Tensor
    index: Tensor | None
    frames: int
    grid: tuple[int, int]
    seen: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Split:
    """Which columns of a forward are visual, and what each may see.

    Args:
        images: visual columns; empty in decoding steps.
        text: (B, N) physical columns of all others; short rows repeat their last one.
        fresh: (B, N) whether an entry of `text` is no repetition.
        position: (B, P) logical position of each column; -1 is padding.
        keys: (B, S) logical position of each cache slot; -1 is padding.
        visual: (B, S) which slots are visual.
    """

    images: Sequence[Images]
    text: Tensor
    fresh: Tensor
    position: Tensor
    keys: Tensor
    visual: Tensor

    @classmethod
    def of(cls, images: Sequence[Images], position: Tensor, keys: Tensor, visual: Tensor) -> Split:
        """Find the text between the images.

        Args:
            images: visual columns.
            position: (B, P), as above.
            keys: (B, S), as above.
            visual: (B, S), as above.
        """
        seen = torch.zeros_like(position, dtype=torch.bool)
        for part in images:
            seen[part.rows, part.columns] = True
        text, fresh = left_align(~seen) if images else _all(position)
        return cls(images, text, fresh, position, keys, visual)

    @cached_property
    def text_slots(self) -> Tensor:
        """(B, S) slots of text."""
        return ~self.visual & (self.keys >= 0)

    @cached_property
    def text_keys(self) -> tuple[Tensor, Tensor]:
        """(B, K) slots of text up to the last image, and (B, K) their positions, -1 for none."""
        last = torch.full_like(self.keys[:, :1], -1)
        for part in self.images:
            end = self.position[part.rows, part.columns].amax(1)
            last = last.scatter_reduce(0, part.rows, end[:, None], "amax")
        slots, fresh = left_align(self.text_slots & (self.keys < last))
        return slots, self.keys.gather(1, slots).masked_fill(~fresh, -1)


def _all(position: Tensor) -> tuple[Tensor, Tensor]:
    columns = torch.arange(position.shape[1], device=position.device).expand_as(position)
    return columns, torch.ones_like(columns, dtype=torch.bool)


def why_unsupported(family: Family, work: PartialCompute) -> str | None:
    """Why a decoder layer cannot be computed in parts, or `None` if it can.

    Args:
        family: the model.
        work: which layer, and what of it.
    """
    layer = family.layers[work.layer]
    kind = type(layer).__name__
    if not family.planar:
        return "its visual tokens are tiles and newlines, which form no single grid"
    if kind not in LAYERS:
        return "they are not made like those of Llama, Mistral, Qwen2 and Qwen3"
    if family.window is not None or work.layer not in family.attention_layers:
        return f"layer {work.layer} sees only a window of the sequence"
    if hasattr(layer, "_hf_hook"):
        return "accelerate moves the data of its layers; load it onto one device"
    for name in (*_ATTENTION, *_MLP):
        if found := _disguise(layer.get_submodule(name)):
            return (
                f"{name} is {found} and not a plain linear layer, whose weights can be sliced; "
                "merge adapters and load unquantized weights"
            )
    heads = heads_of(layer.get_submodule("self_attn"))
    if work.heads is not None and len(work.heads) != heads:
        return f"the mask has {len(work.heads)} heads, and layer {work.layer} has {heads}"
    return None


def _disguise(module: nn.Module) -> str | None:
    """What a projection is that its weight alone does not tell; `None` for a plain linear layer."""
    kind = f"a {type(module).__name__}"
    if type(module) is not nn.Linear:
        return kind
    if has_own_forward(module) or "_hf_hook" in vars(module):
        return f"{kind} whose forward was replaced"
    weight: Any = module.weight
    if type(weight).__module__.partition(".")[0] != "torch":  # as torchao's
        return f"{kind} with a weight of type {type(weight).__name__}"
    if not weight.is_floating_point() or weight.element_size() == 1:
        return f"{kind} with a weight in {weight.dtype}"
    return None


def run_layer(
    layer: Any,
    work: PartialCompute,
    split: Split,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Any,
) -> Tensor:
    """A decoder layer, with less work on visual tokens.

    Args:
        layer: its module.
        work: what visual tokens get of it.
        split: which columns they are.
        hidden: (B, P, D) its input.
        rotary: cos and sin of the columns.
        mask: what the attention kernel would be handed, physical.
        cache: the key-value cache, or `None`.

    Returns:
        (B, P, D) its output.
    """
    normed = layer.input_layernorm(hidden)
    attention = _Attention(layer.self_attn, work, split, normed)
    hidden = hidden + attention.run(rotary, mask, cache)
    normed = layer.post_attention_layernorm(hidden)
    return hidden + _mlp(layer.mlp, work, split, normed)


class _Parts:
    """(B, P, D) states as flat text rows and flat visual rows."""

    def __init__(self, split: Split, x: Tensor) -> None:
        width = x.shape[1]
        start = torch.arange(len(x), device=x.device)[:, None] * width
        self.shape, self.flat = x.shape[:2], x.flatten(0, 1)
        self.text = (split.text + start)[split.fresh]
        places = [(part.columns + part.rows * width).flatten() for part in split.images]
        self.visual = torch.cat(places) if places else self.text[:0]

    def map(self, text: Any, visual: Any, width: int) -> Tensor:
        """(B, P, width): one function on text rows, another on visual rows."""
        out = self.flat.new_zeros(len(self.flat), width)
        out = out.index_copy(0, self.text, text(self.flat[self.text]))
        if len(self.visual):
            out = out.index_copy(0, self.visual, visual(self.flat[self.visual]))
        return out.unflatten(0, self.shape)


def _mlp(mlp: Any, work: PartialCompute, split: Split, x: Tensor) -> Tensor:
    """The MLP; visual tokens pass its first neurons only."""
    width = mlp.gate_proj.out_features
    kept = int(width / work.mlp_divisor)
    if not split.images or kept == width:
        return mlp(x)

    def visual(rows: Tensor) -> Tensor:
        gate = mlp.act_fn(_linear(mlp.gate_proj, rows, slice(kept)))
        return F.linear(
            gate * _linear(mlp.up_proj, rows, slice(kept)),
            mlp.down_proj.weight[:, :kept],
            mlp.down_proj.bias,
        )

    return _Parts(split, x).map(mlp, visual, x.shape[-1])


def _linear(linear: nn.Linear, x: Tensor, rows: Any) -> Tensor:
    return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


class _Attention:
    """Attention of one layer on normed states (B, P, D)."""

    def __init__(self, module: Any, work: PartialCompute, split: Split, x: Tensor) -> None:
        self.module, self.work, self.split, self.x = module, work, split, x
        self.heads, self.width = heads_of(module), module.head_dim
        self.repeats = module.num_key_value_groups
        every = tuple(range(self.heads))
        given = work.heads or (True,) * self.heads
        self.active = tuple(i for i in every if given[i])
        self.readers = self.active if work.reads_visual else ()  # heads that read visual values
        self.visual_blind = tuple(i for i in every if i not in self.readers)
        self.parts = _Parts(split, x)

    def run(self, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        """(B, P, D) what the layer adds to its input."""
        module, batch = self.module, len(self.x)
        q, k, v = self._project(rotary)
        if cache is not None:
            k, v = cache.update(k, v, module.layer_idx)
        out = self.x.new_zeros(*self.x.shape[:2], self.heads, self.width)
        rows = torch.arange(batch, device=out.device)[:, None]
        fresh = self.split.fresh
        text = self._text(q, k, v, mask).transpose(1, 2)
        where = rows.expand_as(fresh)[fresh], self.split.text[fresh]
        out = out.index_put(where, text[fresh])
        if self.active and self.split.images:
            heads = torch.tensor(self.active, device=out.device)
            for part in self.split.images:
                seen = self._images(part, q, k, v).transpose(1, 2)
                columns = part.rows[..., None], part.columns[..., None], heads
                out = out.index_put(columns, seen)
        if cache is not None and self.work.text_only_cache and self.split.images:
            held = cache.layers[module.layer_idx]
            held.evict(*held.slots.keep(self.split.text_slots))
        return self._output(out.flatten(2))

    # -- projections: visual tokens pass those heads only that need them

    def _project(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H or Hkv, P, d) rotated queries and keys, and values."""
        module = self.module
        groups = self._groups(self.active)
        keys = groups if self.work.renormalize else self._groups(range(self.heads))
        values = self._groups(self.readers)
        q = self._heads(module.q_proj, self.active, "q_norm")
        k = self._heads(module.k_proj, keys, "k_norm")
        v = self._heads(module.v_proj, values, "")
        q, k = rotary_function(module)(q, k, *rotary)
        return q, k, v

    def _groups(self, heads: Sequence[int]) -> tuple[int, ...]:
        """Key-value heads of query heads."""
        return tuple(sorted({head // self.repeats for head in heads}))

    def _heads(self, linear: nn.Linear, heads: Sequence[int], norm: str) -> Tensor:
        """(B, heads, P, d) of a projection; heads not named are zero at visual tokens."""
        if not self.split.images or len(heads) * self.width == linear.out_features:
            x = linear(self.x)
        else:
            rows = self._columns(heads)

            def visual(x: Tensor) -> Tensor:
                part = _linear(linear, x, rows)
                return part.new_zeros(len(x), linear.out_features).index_copy(1, rows, part)

            x = self.parts.map(linear, visual, linear.out_features)
        x = x.unflatten(2, (-1, self.width))
        if (module := getattr(self.module, norm, None)) is not None:
            x = module(x)
        return x.transpose(1, 2)

    def _columns(self, heads: Sequence[int]) -> Tensor:
        """Rows of a projection's weight that make some heads."""
        first = torch.tensor(tuple(heads), dtype=torch.long, device=self.x.device) * self.width
        return (first[:, None] + torch.arange(self.width, device=self.x.device)).flatten()

    def _output(self, out: Tensor) -> Tensor:
        """The output projection of (B, P, H d)."""
        linear = self.module.o_proj
        if not self.split.images or len(self.active) == self.heads:
            return linear(out)
        columns = self._columns(self.active)

        def visual(x: Tensor) -> Tensor:
            return F.linear(x[:, columns], linear.weight[:, columns], linear.bias)

        return _Parts(self.split, out).map(linear, visual, linear.out_features)

    # -- attention of text tokens

    def _text(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, N, d): as always in heads that read visual tokens; in others without these."""
        split = self.split
        if split.images:
            q = q.gather(2, split.text[:, None, :, None].expand(-1, self.heads, -1, self.width))
        allowed = self._allowed(mask, k.shape[2])
        visual = F.pad(split.visual, (0, k.shape[2] - split.visual.shape[1]))
        out = q.new_zeros(q.shape)
        for heads, reads in ((self.readers, True), (self.visual_blind, False)):
            if not heads:
                continue
            which = torch.tensor(heads, device=q.device)
            keys, values = k[:, which // self.repeats], v[:, which // self.repeats]
            may = allowed
            if not reads and self.work.renormalize:
                may = allowed & ~visual[:, None, None]
            elif not reads:
                values = values.masked_fill(visual[:, None, :, None], 0.0)
            out = out.index_copy(1, which, self._sdpa(q[:, which], keys, values, may))
        return out

    def _allowed(self, mask: Tensor | None, width: int) -> Tensor:
        """(B, 1, N, S) what text tokens may see; each at least itself, so that all is finite."""
        split = self.split
        position = split.position.gather(1, split.text)[:, :, None]
        keys = F.pad(split.keys, (0, width - split.keys.shape[1]), value=-1)[:, None]
        itself = keys == position
        if mask is not None and mask.dim() == 4:
            rows = mask.expand(len(position), 1, -1, -1)[:, 0]
            rows = take(rows, split.text) if split.images else rows
            return (itself | (rows if rows.dtype == torch.bool else rows >= 0))[:, None]
        allowed = (keys >= 0) & (keys <= position)
        if mask is not None:
            allowed &= F.pad(mask.bool(), (0, width - mask.shape[1]))[:, None]
        return (itself | allowed)[:, None]

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=self.module.scaling)

    # -- attention of visual tokens

    def _images(self, part: Images, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(G, heads, V, d): text before them, and neighbours in their frame, later ones too."""
        heads = torch.tensor(self.active, device=q.device)
        kv, rows = heads // self.repeats, part.rows[..., None]
        slots, positions = self.split.text_keys
        past = self.split.keys.shape[1] - self.split.position.shape[1]
        new, old = part.columns[..., None], slots[part.rows[:, 0]][..., None]
        queries = q[rows, heads, new]
        keys, values = (x[rows, kv, new + past] for x in (k, v))
        text_keys, text_values = (x[rows, kv, old].transpose(1, 2) for x in (k, v))
        mine = self.split.position[part.rows, part.columns]
        before = positions[part.rows[:, 0]][:, None]
        may = (before >= 0) & (before < mine[..., None])
        grid = Grid(part.frames, *part.grid, self.work.window)
        image = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        common = text_keys, text_values, may
        return window_attention(image, common, grid, self.module.scaling, part.index, part.seen)
