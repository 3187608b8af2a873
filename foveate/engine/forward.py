"""ForwardPass: one forward through the text model; it is gone when the forward ends.

Shapes: `B` batch, `T` logical length of this forward, `P` physical columns, `H` heads, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.engine.apply_step import apply_step
from foveate.engine.attentions import Seen, widen_maps
from foveate.engine.cache import PrunedLayer, PrunedStaticLayer, pruned_layer
from foveate.engine.decoder_signals import DecoderSignals
from foveate.engine.extensions.base import Extension
from foveate.engine.images import ImageGroup
from foveate.engine.layout import (
    Layout,
    Slots,
    compact,
    expansion,
    take,
    take_positions,
    translate_mask,
)
from foveate.engine.plan import Plan, PlannedStep
from foveate.engine.prompt import starts
from foveate.engine.replaced_forward import bypassed
from foveate.engine.state import Prompt
from foveate.families import Family


class ForwardPass:
    """One forward: which columns are alive at each layer, and what each layer must be told.

    Args:
        plan: the session's plan.
        family: the model's family.
        prompt: what the forward is about.
    """

    def __init__(self, plan: Plan, family: Family, prompt: Prompt) -> None:
        self.plan = plan
        self.family = family
        self.prompt = prompt
        self.groups = prompt.groups
        self.full = Layout.full(prompt.batch, prompt.length, prompt.device)
        self.layout = self.full
        self.layer_layouts: list[Layout] = []
        self.layer_tokens: list[list[int]] = []
        self.prompt_tokens = self._count_tokens()
        self.tokens = list(self.prompt_tokens)
        self.fresh = Slots.full(prompt.batch, prompt.past, prompt.device)
        self.decoder_signals = DecoderSignals(self)
        self.extensions: list[Extension] = [extension(self, plan) for extension in plan.extensions]
        self.recomputed = False  # whether a checkpoint runs it again
        self._attended: dict[int, Seen] = {}  # what layers attend with, where columns are missing
        self._views: dict[tuple[int, ...], tuple[dict[str, Any], Slots, tuple[Any, ...]]] = {}
        self._entry: Tensor | None = None  # (B, P) columns that layer 0 keeps of its input
        self._entrance = self.full  # the layout that they make
        self._shift: Tensor | None = None  # (B, T) what renumbering takes off each position
        self._renumbered: Tensor | None = None  # (B, 1) the same for what follows

    def enter(
        self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Reduce what is due before a layer, and translate what the layer is handed.

        Args:
            number: the decoder layer.
            layer: its module.
            hidden: (B, P, D) its input.
            kwargs: its keyword arguments, in logical terms.

        Returns:
            hidden and keyword arguments in physical terms; the same objects where nothing changes.
        """
        if self.groups:
            if number != len(self.layer_layouts):  # those before it have come by otherwise
                raise bypassed(self.family.layers[number - 1])
            hidden = self._reduce(number, layer, hidden, kwargs)
            self.layer_layouts.append(self.layout)
            self.layer_tokens.append(self.tokens)
        for extension in self.extensions:
            kwargs = extension.enter(number, layer, hidden, kwargs)
        cache = kwargs.get("past_key_values")
        runs = any(extension.runs(number) for extension in self.extensions)
        if self.layout is self.full and not runs and not _is_pruned(cache, number):
            return hidden, kwargs
        before, width, held = self.fresh, 0, None
        if cache is not None:
            removed = self.prompt.length - self.layout.index.shape[1]
            held = pruned_layer(cache, number, self.fresh, removed)
            assert held.slots is not None
            before, width = (
                held.slots,
                held.max_cache_len if isinstance(held, PrunedStaticLayer) else 0,
            )
        # The mask and the rotary embedding differ between kinds of layers in some models.
        logical = kwargs.get("attention_mask"), kwargs["position_embeddings"]
        key = (id(before), id(self.layout), *map(id, logical))
        view = None if self.recomputed else self._views.get(key)
        if view is None:
            view = *self._view(number, before, width, hidden, kwargs), (before, logical)
            if not self.recomputed:  # else nobody asks again, and a checkpoint waits for its end
                self._views[key] = view
        changes, after, _ = view
        if held is not None:
            held.incoming = after
        self._attended[number] = Seen.of(self.layout, after, held, self.prompt.length)
        for extension in self.extensions:
            extension.see(number, after, held)
        return hidden, {**kwargs, **changes} if changes else kwargs

    def _view(
        self, number: int, before: Slots, width: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], Slots]:
        """Keyword arguments that change for layers that share slots and layout, and their slots
        afterwards.
        """
        tracked = any(extension.tracks_visual for extension in self.extensions)
        visual = self.prompt.visual if tracked else None
        after = before.extend(self.layout, self.prompt.length, self._renumbered, visual)
        mask = kwargs.get("attention_mask")
        rotary, position_ids = self.positions(number, before, hidden, kwargs)
        physical = {
            "attention_mask": translate_mask(
                mask, self.layout, after, self.prompt.length, two_d=self.prompt.flash, width=width
            ),
            "position_embeddings": rotary,
            "position_ids": position_ids,
        }
        changes = {name: value for name, value in physical.items() if value is not kwargs.get(name)}
        return changes, after

    def seen(self, group: ImageGroup) -> Tensor | None:
        """(G, V) which living tokens of a group the caller has not hidden; `None` for all."""
        hidden = self.prompt.hidden
        if hidden is None or group.columns is None:
            return None
        return ~hidden[self.row_index(group), group.columns]

    def positions(
        self, number: int, before: Slots, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Any, Tensor | None]:
        """(cos, sin) and position ids of the physical columns."""
        rotary, position_ids = kwargs["position_embeddings"], kwargs.get("position_ids")
        renumbered = self._shift is not None or before.renumbered is not None
        if self.layout is self.full and not renumbered:
            return rotary, position_ids
        positions = position_ids
        if self.layout is not self.full:
            columns = self.layout.index.clamp(min=0)
            positions = None if position_ids is None else take_positions(position_ids, columns)
        if renumbered:
            # Every supported text model hands position_ids to its layers.
            assert positions is not None
            if self._shift is not None:
                positions = positions - self._shift.gather(1, self.layout.index.clamp(min=0))
            if before.renumbered is not None:
                positions = positions - before.renumbered
            rotary = self.family.rotary(hidden, positions, number)
        else:
            rotary = tuple(take(part, columns) for part in rotary)
        # Flash kernels read gaps in the position ids of a single row as packed sequences.
        return rotary, self._packed() if self.prompt.flash else positions

    def _packed(self) -> Tensor | None:
        """(B, P) places of the columns in packed samples, for kernels that tell these apart so."""
        if self.prompt.sample is None:
            return None
        sample = self.prompt.sample.gather(1, self.layout.index.clamp(min=0))
        return torch.arange(sample.shape[1], device=sample.device) - starts(sample)

    def begin(self, embeds: Tensor) -> None:
        """Drop what was removed from the image features.

        Args:
            embeds: (B, T, D) input of the text model; rows that were removed hold NaN.
        """
        lost = False
        for group in self.groups:
            gone = group.shape.total - group.index.shape[1]
            lost |= gone > 0
            for row in group.rows:
                self.tokens[row] -= gone
        if lost:
            marked = embeds[..., 0].isnan().to(self.prompt.device)
            self._entry = self._compact(marked, self.plan.renumber_features)
            self._entrance = self.layout

    def deepstack(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the text model whose DeepStack planes follow the columns of layer 0.

        Args:
            kwargs: with `visual_pos_masks` (B, T) and `deepstack_visual_embeds`, (N, D) each.
        """
        visual, planes = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        if visual is None or planes is None or self._entry is None:
            return kwargs
        columns = self.layout.index.to(visual.device)
        physical = visual.gather(1, columns.clamp(min=0)) & (columns >= 0)
        alive = torch.zeros_like(visual)
        rows = torch.arange(visual.shape[0], device=visual.device)[:, None].expand_as(columns)
        alive[rows[physical], columns[physical]] = True
        kept = alive[visual]
        planes = [plane[kept.to(plane.device)] for plane in planes]
        return {**kwargs, "visual_pos_masks": physical, "deepstack_visual_embeds": planes}

    def _reduce(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if number == 0 and self._entry is not None:
            hidden = self._take(hidden, self._entry)
        collects = number in self.plan.decoder_signals
        if collects:
            self.decoder_signals.collect(number, layer, hidden, kwargs)
        for planned in self.plan.llm:
            if planned.step.layer != number:
                continue
            replaced = [extension.before_step(planned, hidden) for extension in self.extensions]
            states = next((states for states in replaced if states is not None), None)
            if states is not None:
                hidden = states
                continue
            before = self.layout
            hidden = self._step(planned, hidden)
            if self.layout is not before:
                for extension in self.extensions:
                    extension.after_step(planned, kwargs.get("past_key_values"))
        if collects:
            self.decoder_signals.collect(number, layer, hidden, kwargs, later=True)
        return hidden

    def _step(self, planned: PlannedStep, hidden: Tensor) -> Tensor:
        """Run one step on every group, then drop what it removed."""

        def features(part: ImageGroup) -> Tensor:
            x = hidden[self.row_index(part), self.columns_of(part, self.layout)]
            seen = self.seen(part)
            return x if seen is None else x.masked_fill(~seen[..., None].to(x.device), 0.0)

        def signals(part: ImageGroup) -> Mapping[str, Tensor]:
            return self.decoder_signals.of(planned.step.needs, part)

        gone = torch.zeros(
            self.prompt.batch, self.prompt.length, dtype=torch.bool, device=self.prompt.device
        )
        groups: list[ImageGroup] = []
        lost = False
        for group in self.groups:
            unasked = self.decoder_signals.without_query(planned.step.needs, group)
            parts = apply_step(planned, group, features, signals, unasked)
            for part, after, reduction in parts:
                groups.append(after)
                if reduction is None:
                    continue
                lost = True
                rows = self.row_index(part)
                gone[rows, part.columns] = True
                gone[rows, after.columns] = False
                self.tokens = list(self.tokens)
                for row in part.rows:
                    self.tokens[row] -= part.index.shape[1] - after.index.shape[1]
                if reduction.merges or reduction.ordered:
                    if (seen := self.seen(part)) is not None:
                        reduction = reduction.without(~seen)
                    where = (rows, self.columns_of(after, self.layout))
                    hidden = hidden.index_put(where, reduction.apply(features(part)))
        self.groups = groups
        if not lost:
            return hidden
        return self._take(hidden, self._compact(gone, planned.renumber))

    def _compact(self, gone: Tensor, renumber: bool) -> Tensor:
        """Drop (B, T) logical positions, and all padding and text that the caller hides.

        Returns:
            (B, P') which column of now each new column is.
        """
        if renumber:
            count = (gone if self.prompt.numbered is None else gone & self.prompt.numbered).long()
            behind = count.cumsum(1)
            shift, total = behind - count, behind[:, -1:]
            if self.prompt.sample is not None:  # each sample has positions of its own
                shift = shift - shift.gather(1, starts(self.prompt.sample))
            self._shift = shift if self._shift is None else self._shift + shift
            self._renumbered = total if self._renumbered is None else self._renumbered + total
        alive = ~gone
        if self.prompt.present is not None:
            alive &= self.prompt.present
        columns = self.layout.index
        living = alive.gather(1, columns.clamp(min=0))
        if self.layout.ragged:
            living &= columns >= 0
        self.layout, source = compact(self.layout, living, self.tokens)
        return source

    def _take(self, hidden: Tensor, source: Tensor) -> Tensor:
        """Columns of hidden states, after the layout has changed."""
        hidden = take(hidden, source)
        if self.layout.ragged:  # padding copies a dead column, which may be marked with NaN
            hidden = hidden.masked_fill((self.layout.index < 0)[..., None].to(hidden.device), 0.0)
        return hidden

    def columns_of(self, part: ImageGroup, layout: Layout) -> Tensor:
        """(G, V) physical columns of a group in a layout."""
        assert part.columns is not None
        if layout is self.full:
            return part.columns
        return torch.searchsorted(
            layout.index[self.row_index(part)[:, 0]].contiguous(), part.columns.contiguous()
        )

    def slots_of(self, cache: Any, number: int) -> Slots:
        """What a cache layer holds before this forward."""
        held = cache.layers[number] if cache is not None and len(cache.layers) > number else None
        if isinstance(held, PrunedLayer) and held.slots is not None:
            return held.slots
        return self.fresh

    def row_index(self, part: ImageGroup) -> Tensor:
        """(G, 1) row of the batch of each image."""
        return torch.tensor(part.rows, device=self.prompt.device)[:, None]

    def _count_tokens(self) -> list[int]:
        if self.prompt.present is None or not self.groups:
            return [self.prompt.length] * self.prompt.batch
        return self.prompt.present.sum(1).tolist()

    def leave(self, output: Any) -> Any:
        """Bring hidden states and attention maps back to logical length, in place.

        Args:
            output: the text model's output.
        """
        self._views.clear()  # they keep alive what they are known by
        widen_maps(output, self.family, self._attended, self.prompt.length)
        if all(layout is self.full for layout in (self.layout, *self.layer_layouts)):
            return output
        states = output.last_hidden_state
        output.last_hidden_state = self._expand(states, self.layout)
        if output.get("hidden_states") is not None:
            layouts, inner = self.layer_layouts, output.hidden_states[1:-1]
            output.hidden_states = (
                self._entered(output.hidden_states[0]),
                *(self._expand(h, layout) for h, layout in zip(inner, layouts, strict=False)),
                output.last_hidden_state,
            )
        return output

    def _entered(self, states: Tensor) -> Tensor:
        """What layer 0 was given, which has all positions: removed ones show what is left."""
        if self._entrance is self.full or states is None:
            return states
        column = expansion(self._entrance, self.prompt.length)
        return take(states, self._entrance.index.gather(1, column).clamp(min=0))

    def _expand(self, states: Tensor, layout: Layout) -> Tensor:
        if layout is self.full or states is None:
            return states
        return take(states, expansion(layout, self.prompt.length))


def _is_pruned(cache: Any, number: int) -> bool:
    return (
        cache is not None
        and len(cache.layers) > number
        and isinstance(cache.layers[number], PrunedLayer)
    )
