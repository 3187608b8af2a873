"""ForwardPass: one forward through the text model; it is gone when the forward ends.

Shapes: `B` batch, `T` logical length of this forward, `P` physical columns, `H` heads, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.core.transfer import upload
from foveate.engine.apply_step import apply_step
from foveate.engine.attentions import widen_maps, widen_states
from foveate.engine.cache import PrunedLayer
from foveate.engine.cache_argument import cache_of
from foveate.engine.decoder_signals import DecoderSignals
from foveate.engine.extensions.base import Extension
from foveate.engine.images import ImageGroup
from foveate.engine.layer_arguments import Keys, LayerArguments
from foveate.engine.layout import Layout, compact, take
from foveate.engine.plan import Due, Plan, PlannedStep
from foveate.engine.renumbering import Renumbering
from foveate.engine.replaced_forward import bypassed
from foveate.engine.slots import Slots
from foveate.engine.state import Kwargs, Prompt
from foveate.families import Family


class ForwardPass:
    """One forward: which columns there are at each layer, and what each layer must be told.

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
        self.last_tokens_from: int | None = None  # layer that is given the last tokens alone
        self.prompt_tokens = self._count_tokens()
        self.tokens = list(self.prompt_tokens)
        self.arguments = LayerArguments(family, prompt, self.full)
        self.decoder_signals = DecoderSignals(self)
        self.extensions: list[Extension] = [extension(self, plan) for extension in plan.extensions]
        self._rows: dict[tuple[int, ...], Tensor] = {}  # rows of a group -> them as a column
        self._entry: Tensor | None = None  # (B, P) columns that layer 0 keeps of its input
        self._entrance = self.full  # the layout that they make
        self._renumbering: Renumbering | None = None
        # Planes by decoder layer, columns that they are added to, and which of their rows.
        self._planes: tuple[dict[int, Tensor], Tensor, Tensor] | None = None

    @torch.compiler.disable
    def enter(
        self, number: int, layer: Any, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Tensor | None, Tensor, Kwargs]:
        """Reduce what is due before a layer, and tell the layer what survives.

        Args:
            number: the decoder layer.
            layer: its module.
            hidden: (B, P, D) its input, or (B, P, S, D) where each token has several streams.
            kwargs: its keyword arguments, in logical terms.

        Returns:
            Its output, where an extension has run it; its input; and its keyword arguments, in
            physical terms.
        """
        if self.groups:
            hidden = self._reduce(number, layer, hidden, kwargs)
        for extension in self.extensions:
            kwargs = extension.enter(number, layer, hidden, kwargs)
        if number in self.family.recurrent_layers:
            return None, hidden, self.arguments.of_state(self.layout, kwargs)
        if number in self.family.keyless_layers:
            return None, hidden, kwargs
        runs = any(extension.runs(number) for extension in self.extensions)
        cache = cache_of(kwargs)
        if self.layout is self.full and not runs and self.arguments.is_unpruned(number, cache):
            return None, hidden, kwargs
        tracked = any(extension.tracks_visual for extension in self.extensions)
        held, slots, kwargs = self.arguments.translate(
            number, self.layout, self._renumbering, hidden, kwargs, tracked=tracked
        )
        for extension in self.extensions:
            extension.see(number, slots, held)
            kwargs = extension.attending(slots, hidden, kwargs)
        for extension in self.extensions:
            if (output := extension.run(number, layer, hidden, kwargs)) is not None:
                return output, hidden, kwargs
        return None, hidden, kwargs

    def seen(self, group: ImageGroup) -> Tensor | None:
        """(G, V) which surviving tokens of a group the caller has not hidden; `None` for all."""
        hidden = self.prompt.hidden
        if hidden is None or group.columns is None:
            return None
        return ~hidden[self.row_index(group), group.columns]

    def positions(
        self, number: int, before: Slots, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Any, Tensor | None]:
        """(cos, sin) and position ids of the physical columns, of a layer with keys of its own."""
        keys = Keys(before, before, self.layout, self._renumbering)
        return self.arguments.positions(number, keys, self.layout, hidden, kwargs)

    def begin(self, marked: Tensor) -> bool:
        """Drop what was removed from the image features.

        Args:
            marked: (B, T) which tokens were.

        Returns:
            Whether any was.
        """
        lost = False
        for group in self.groups:
            gone = group.shape.total - group.index.shape[1]
            lost |= gone > 0
            for row in group.rows:
                self.tokens[row] -= gone
        if lost:
            self._entry = self._compact(marked.to(self.prompt.device), self.plan.renumber_features)
            self._entrance = self.layout
        return lost

    def deepstack(self, kwargs: Kwargs) -> dict[str, Any]:
        """Keyword arguments of the text model whose DeepStack planes follow the columns of layer 0.

        Args:
            kwargs: with `visual_pos_masks` (B, T) and `deepstack_visual_embeds`, (N, D) each; or
                with `vision_mask` (B, T, 1) and `deepstack_features` by decoder layer, before which
                they are added: before the first the columns are still all there.
        """
        if self._entry is None:
            return kwargs
        visual, planes = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        if visual is not None and planes is not None:
            physical, kept = self._surviving(visual, len(planes[0]))
            planes = [plane.index_select(0, kept.to(plane.device)) for plane in planes]
            return {**kwargs, "visual_pos_masks": physical, "deepstack_visual_embeds": planes}
        visual, by_layer = kwargs.get("vision_mask"), kwargs.get("deepstack_features")
        if visual is not None and by_layer is not None:
            count = len(next(iter(by_layer.values())))
            self._planes = by_layer, *self._surviving(visual[..., 0], count)
            first = {0: by_layer[0]} if 0 in by_layer else None
            return {**kwargs, "deepstack_features": first}
        return kwargs

    def _surviving(self, visual: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(B, P) which columns of layer 0 are visual, and (K) which visual tokens they are.

        Args:
            visual: (B, T) which of all columns are visual: all but those of audio.
            count: their number.
        """
        columns = self.layout.index.to(visual.device)
        physical = visual.gather(1, columns.clamp(min=0)) & (columns >= 0)
        number = visual.flatten().cumsum(0).view_as(visual) - 1  # of each visual token
        lost = sum(of.dropped * len(of.images) for of in self.groups if not of.audio)
        # The surviving ones keep their order, and all others come after them.
        rank = number.gather(1, columns.clamp(min=0)).masked_fill(~physical, count)
        return physical, rank.flatten().sort().values[: count - lost]

    def _add_plane(
        self,
        number: int,
        hidden: Tensor,
        by_layer: Mapping[int, Tensor],
        physical: Tensor,
        kept: Tensor,
    ) -> Tensor:
        """Add the plane of a decoder layer after the first, which the text model can no longer."""
        if number == 0 or number not in by_layer:
            return hidden
        plane, physical = by_layer[number], physical.to(hidden.device)[..., None]
        plane = plane.index_select(0, kept.to(plane.device)).to(hidden.device, hidden.dtype)
        added = torch.zeros_like(hidden).masked_scatter(physical, plane)
        return torch.where(physical, hidden + added, hidden)

    def _reduce(self, number: int, layer: Any, hidden: Tensor, kwargs: Kwargs) -> Tensor:
        """Let steps act that are due before a layer, and note what survives there."""
        if number != len(self.layer_layouts):  # those before it have come by otherwise
            raise bypassed(self.family.layers[number - 1])
        if number == 0 and self._entry is not None:
            hidden = self._take(hidden, self._entry)
        if self._planes is not None:
            hidden = self._add_plane(number, hidden, *self._planes)
        due = self.plan.due if self.prompt.training is None else self.plan.training_due
        if (due_here := due.get(number)) is not None:
            hidden = self._act(due_here, number, layer, hidden, kwargs)
        self.layer_layouts.append(self.layout)
        count, tokens = hidden.shape[1], self.tokens
        if count < self.layout.index.shape[1]:  # the text model goes on with the last ones
            self.last_tokens_from, tokens = self.last_tokens_from or number, [count] * len(tokens)
        self.layer_tokens.append(tokens)
        return hidden

    def _act(self, due: Due, number: int, layer: Any, hidden: Tensor, kwargs: Kwargs) -> Tensor:
        """Collect what is due before a layer, and let steps act; arguments as in `enter`."""
        if due.signals:
            self.decoder_signals.collect(due.signals, number, layer, hidden, kwargs)
        streams = hidden.shape[2:]
        hidden = hidden.flatten(2)  # those of a token are one to steps
        for planned in due.steps:
            replaced = [extension.before_step(planned, hidden) for extension in self.extensions]
            states = next((states for states in replaced if states is not None), None)
            if states is not None:
                hidden = states
                continue
            before = self.layout
            hidden = self._step(planned, hidden)
            if self.layout is not before:
                for extension in self.extensions:
                    extension.after_step(planned, cache_of(kwargs))
        hidden = hidden.unflatten(2, streams)
        if due.later:
            self.decoder_signals.collect(due.later, number, layer, hidden, kwargs)
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
        yes = torch.ones((), dtype=torch.bool, device=gone.device)  # a number would be uploaded
        groups: list[ImageGroup] = []
        lost = False
        for group in self.groups:
            unasked = self.decoder_signals.without_query(planned.step.needs, group)
            parts = apply_step(planned, group, features, signals, unasked, self.prompt.training)
            for part, after, reduction in parts:
                groups.append(after)
                if reduction is None:
                    continue
                if reduction.gates is not None:
                    for extension in self.extensions:
                        extension.gate(part, reduction.gates)
                    continue
                lost = True
                rows = self.row_index(part)
                gone[rows, part.columns] = yes
                gone[rows, after.columns] = ~yes
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
            self._renumbering = Renumbering.of(gone, self.prompt, self._renumbering)
        kept = ~gone
        if self.prompt.present is not None:
            kept &= self.prompt.present
        columns = self.layout.index
        kept = kept.gather(1, columns.clamp(min=0))
        if self.layout.ragged:
            kept &= columns >= 0
        self.layout, source = compact(self.layout, kept, self.tokens, self.prompt.told.tail)
        return source

    def _take(self, hidden: Tensor, source: Tensor) -> Tensor:
        """Columns of hidden states, after the layout has changed."""
        hidden = take(hidden, source)
        if self.layout.ragged:  # padding copies a dropped column, which may be marked with NaN
            padding = (self.layout.index < 0)[(...,) + (None,) * (hidden.dim() - 2)]
            hidden = hidden.masked_fill(padding.to(hidden.device), 0.0)
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
        return self.arguments.fresh

    def row_index(self, part: ImageGroup) -> Tensor:
        """(G, 1) row of the batch of each image."""
        rows = self._rows.get(part.rows)
        if rows is None:
            rows = upload(part.rows, self.prompt.device)[:, None]
            self._rows[part.rows] = rows
        return rows

    def _count_tokens(self) -> list[int]:
        present = self.prompt.told.present
        if present is None or not self.groups:
            return [self.prompt.length] * self.prompt.batch
        return present.expand(self.prompt.batch, -1).sum(1).tolist()

    def leave(self, output: Any) -> Any:
        """Bring hidden states and attention maps back to logical length, in place.

        Args:
            output: the text model's output.
        """
        self.arguments.forget()
        widen_maps(output, self.family, self.arguments.attended, self.prompt.length)
        layouts = (*self.layer_layouts, self.layout)
        axis, length = self.family.token_axis, self.prompt.length
        widen_states(output, self.full, self._entrance, layouts, length, axis)
        return output
