"""ForwardPass: one forward through the text model; it is gone when the forward ends.

Shapes: `B` batch, `T` logical length of this forward, `P` physical columns, `H` heads, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from foveate.engine.apply_step import apply_step
from foveate.engine.attentions import Seen, widen_maps, widen_states
from foveate.engine.cache import PrunedLayer, pruned_layer
from foveate.engine.decoder_signals import DecoderSignals
from foveate.engine.extensions.base import Extension
from foveate.engine.images import ImageGroup
from foveate.engine.layout import (
    Layout,
    Slots,
    compact,
    take,
    take_positions,
    translate_mask,
    translate_padding,
)
from foveate.engine.plan import Due, Plan, PlannedStep
from foveate.engine.renumbering import Renumbering, places_in_samples
from foveate.engine.replaced_forward import bypassed
from foveate.engine.state import Kwargs, Prompt
from foveate.errors import InputError
from foveate.families import Family


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys that a layer attends to: its own, or those of an earlier layer.

    Args:
        before: their slots before the forward.
        after: their slots after it.
        renumbering: what was taken off positions in this forward by the time they were made.
    """

    before: Slots
    after: Slots
    renumbering: Renumbering | None


@dataclass(frozen=True, eq=False)
class View:
    """What layers are handed that share keys, columns and arguments.

    Args:
        changes: keyword arguments that change from logical to physical terms.
        seen: what they attend with.
        named: what the key of the view is ids of, which must last as long as the view.
    """

    changes: Kwargs
    seen: Seen
    named: tuple[Any, ...]


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
        self._views: dict[tuple[int, ...], View] = {}
        self._positions_by_key: dict[tuple[int, ...], tuple[Any, Tensor | None, Any]] = {}
        self._keys: dict[int, Keys] = {}  # of layers that lack columns or slots
        self._last_queries: Layout | None = None  # where layers are given the last columns alone
        self._rows: dict[tuple[int, ...], Tensor] = {}  # rows of a group -> them as a column
        self._entry: Tensor | None = None  # (B, P) columns that layer 0 keeps of its input
        self._entrance = self.full  # the layout that they make
        self._renumbering: Renumbering | None = None

    @torch.compiler.disable
    def enter(
        self, number: int, layer: Any, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Tensor | None, Tensor, Kwargs]:
        """Reduce what is due before a layer, and tell the layer what is alive.

        Args:
            number: the decoder layer.
            layer: its module.
            hidden: (B, P, D) its input.
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
            return None, hidden, self._of_state(kwargs)
        cache = kwargs.get("past_key_values")
        if self.layout is self.full and self._is_whole(number, cache):
            return None, hidden, kwargs
        held = self._held(number, cache)
        keys, queries = self._keys_of(number, held), self._queries(hidden.shape[1])
        view = self._view(number, keys, held, queries, hidden, kwargs)
        self._attended[number] = view.seen
        kwargs = {**kwargs, **view.changes, **self._per_position(queries, kwargs)}
        for extension in self.extensions:
            extension.see(number, view.seen.slots, held)
        for extension in self.extensions:
            if (output := extension.run(number, layer, hidden, kwargs)) is not None:
                return output, hidden, kwargs
        return None, hidden, kwargs

    def _of_state(self, kwargs: Kwargs) -> Kwargs:
        """Keyword arguments of a layer that mixes its columns into a running state.

        Raises:
            InputError: padding would come between the state and the columns, and fade the state.
        """
        if self.layout is self.full:
            return kwargs
        if self.layout.ragged and self.prompt.past:
            raise InputError(
                f"rows of this batch keep different numbers of tokens after a KV cache, so padding "
                f"would run through the recurrent layers of {self.family.model_type}; give every "
                "row as many visual tokens and as much text, or run the rows one by one"
            )
        mask = translate_padding(kwargs.get("attention_mask"), self.layout)
        return {**kwargs, "attention_mask": mask}

    def _is_whole(self, number: int, cache: Any) -> bool:
        """Whether a layer lacks nothing, if no column does: neither in the cache, nor because an
        extension runs it.
        """
        if any(extension.runs(number) for extension in self.extensions):
            return False
        if (donor := self.family.donors[number]) != number:
            return donor not in self._keys
        held = cache.layers[number] if cache is not None and len(cache.layers) > number else None
        return not isinstance(held, PrunedLayer)

    def _held(self, number: int, cache: Any) -> Any:
        """The cache layer with the keys of a layer, made a pruned one if they are its own; `None`
        without a cache. Nothing here may hold on to it: it must go when the cache does.
        """
        if cache is None:
            return None
        if (donor := self.family.donors[number]) != number:
            return cache.layers[donor]
        return pruned_layer(
            cache, number, self.fresh, self.prompt.length - self.layout.index.shape[1]
        )

    def _keys_of(self, number: int, held: Any) -> Keys:
        """The keys of a layer; its layer of the cache learns which columns it is about to get."""
        length, donor = self.prompt.length, self.family.donors[number]
        if donor in self._keys and donor != number:
            return self._keys[donor]
        if donor != number:  # from which nothing was removed
            window = getattr(held, "sliding_window", None)
            before = self.fresh if window is None else self.fresh.last(window - 1)
            return Keys(before, before.extend(self.full, length, None), None)
        tracked = any(extension.tracks_visual for extension in self.extensions)
        visual = self.prompt.visual if tracked else None
        total = None if self._renumbering is None else self._renumbering.total
        before = self.fresh if held is None else held.slots
        after = before.extend(self.layout, length, total, visual)
        if held is not None:
            held.incoming = after
        keys = self._keys[number] = Keys(before, after, self._renumbering)
        return keys

    def _queries(self, count: int) -> Layout:
        """The columns that a layer is given: all, or the last ones where the text model goes on
        with these alone. They are the last positions too, and numbered from the first of them.

        Raises:
            InputError: some of the last positions were removed.
        """
        if count == self.layout.index.shape[1]:
            return self.layout
        if self._last_queries is None or self._last_queries.index.shape[1] != count:
            index = self.layout.index[:, -count:] - (self.prompt.length - count)
            if not bool((index == torch.arange(count, device=index.device)).all()):
                raise InputError(
                    f"logits of the last {count} tokens are wanted, but some of these are visual "
                    "tokens that were removed; use a smaller logits_to_keep"
                )
            self._last_queries = Layout(index, ragged=False)
        return self._last_queries

    def _view(
        self, number: int, keys: Keys, held: Any, queries: Layout, hidden: Tensor, kwargs: Kwargs
    ) -> View:
        """What a layer is handed; layers that share keys, columns and arguments share that."""
        # The mask and the rotary embedding differ between kinds of layers in some models.
        logical = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        named = type(held), keys.before, keys.renumbering, queries, *logical
        key = tuple(map(id, named))
        view = self._views.get(key)
        if view is None:
            length = self.prompt.length if queries is self.layout else queries.index.shape[1]
            seen = Seen.of(queries, keys.after, held, length)
            width = held.max_cache_len if isinstance(held, StaticLayer) else 0
            changes = self._physical(number, keys, width, queries, hidden, kwargs)
            view = View(changes, seen, named)
            if not self.recomputed:  # else nobody asks again, and a checkpoint waits for its end
                self._views[key] = view
        return view

    def _physical(
        self, number: int, keys: Keys, width: int, queries: Layout, hidden: Tensor, kwargs: Kwargs
    ) -> Kwargs:
        """Keyword arguments that change for layers that share a view, in physical terms.

        Args:
            number: the decoder layer.
            keys: its keys.
            width: slots of a static cache; 0 for any other.
            queries: its columns.
            hidden: (B, P, D) its input.
            kwargs: its keyword arguments, in logical terms.
        """
        length = self.prompt.length if queries is self.layout else queries.index.shape[1]
        mask = translate_mask(
            kwargs.get("attention_mask"),
            queries,
            keys.after,
            length,
            two_d=self.prompt.flash,
            width=width,
        )
        rotary, position_ids = self._positions(
            number, queries, keys.before.renumbered, keys.renumbering, hidden, kwargs
        )
        physical = {
            "attention_mask": mask,
            "position_embeddings": rotary,
            "position_ids": position_ids,
        }
        return {name: value for name, value in physical.items() if value is not kwargs.get(name)}

    def _per_position(self, queries: Layout, kwargs: Kwargs) -> Kwargs:
        """Arguments of a layer that only some families have, at its columns."""
        if queries is not self.layout or self.layout is self.full:
            return {}
        columns = queries.index.clamp(min=0)
        given = ((name, kwargs.get(name)) for name in self.family.per_position)
        return {name: take(value, columns) for name, value in given if value is not None}

    def seen(self, group: ImageGroup) -> Tensor | None:
        """(G, V) which living tokens of a group the caller has not hidden; `None` for all."""
        hidden = self.prompt.hidden
        if hidden is None or group.columns is None:
            return None
        return ~hidden[self.row_index(group), group.columns]

    def positions(
        self, number: int, before: Slots, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Any, Tensor | None]:
        """(cos, sin) and position ids of the physical columns, of a layer with keys of its own."""
        return self._positions(
            number, self.layout, before.renumbered, self._renumbering, hidden, kwargs
        )

    def _positions(
        self,
        number: int,
        queries: Layout,
        earlier: Tensor | None,
        renumbering: Renumbering | None,
        hidden: Tensor,
        kwargs: Kwargs,
    ) -> tuple[Any, Tensor | None]:
        """The same of any layer; `earlier` is what renumbering took off before the forward, and
        `renumbering` what it took off in it.
        """
        rotary, position_ids = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        if queries is self.full and renumbering is None and earlier is None:
            return rotary, position_ids
        named = queries, earlier, renumbering, rotary, position_ids
        key = tuple(map(id, named))
        found = self._positions_by_key.get(key)
        if found is None:
            made = self._make_positions(
                number, queries, earlier, renumbering, hidden, rotary, position_ids
            )
            found = (*made, named)
            if not self.recomputed:
                self._positions_by_key[key] = found
        return found[:2]

    def _make_positions(
        self,
        number: int,
        queries: Layout,
        earlier: Tensor | None,
        renumbering: Renumbering | None,
        hidden: Tensor,
        rotary: Any,
        position_ids: Tensor | None,
    ) -> tuple[Any, Tensor | None]:
        count, columns = queries.index.shape[1], queries.index.clamp(min=0)
        last = queries is not self.layout  # rotary embeddings are those of the last positions
        positions = position_ids
        if positions is not None and last:
            positions = positions[..., -count:]
        elif positions is not None and queries is not self.full:
            positions = take_positions(positions, columns)
        if renumbering is not None or earlier is not None:
            # Every supported text model hands position_ids to its layers.
            assert positions is not None
            if renumbering is not None:
                shift = renumbering.shift
                shift = shift[:, -count:] if last else shift.gather(1, columns)
                positions = positions - shift
            if earlier is not None:
                positions = positions - earlier
            rotary = self.family.rotary(hidden, positions, number)
        elif rotary is not None and not last:
            rotary = tuple(take(part, columns) for part in rotary)
        # Flash kernels read gaps in the position ids of a single row as packed sequences.
        if self.prompt.flash:
            positions = places_in_samples(self.prompt.sample, columns)
        return rotary, positions

    def begin(self, embeds: Tensor) -> Tensor | None:
        """Drop what was removed from the image features.

        Args:
            embeds: (B, T, D) input of the text model; rows that were removed hold NaN.

        Returns:
            (B, T) which were removed; `None` if none was.
        """
        lost = False
        for group in self.groups:
            gone = group.shape.total - group.index.shape[1]
            lost |= gone > 0
            for row in group.rows:
                self.tokens[row] -= gone
        if not lost:
            return None
        marked = embeds[..., 0].isnan().to(self.prompt.device)
        self._entry = self._compact(marked, self.plan.renumber_features)
        self._entrance = self.layout
        return marked

    def deepstack(self, kwargs: Kwargs) -> dict[str, Any]:
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

    def _reduce(self, number: int, layer: Any, hidden: Tensor, kwargs: Kwargs) -> Tensor:
        """Let steps act that are due before a layer, and note what is alive there."""
        if number != len(self.layer_layouts):  # those before it have come by otherwise
            raise bypassed(self.family.layers[number - 1])
        if number == 0 and self._entry is not None:
            hidden = self._take(hidden, self._entry)
        if (due := self.plan.due.get(number)) is not None:
            hidden = self._act(due, number, layer, hidden, kwargs)
        self.layer_layouts.append(self.layout)
        last = hidden.shape[1] < self.layout.index.shape[1]  # the text model goes on with these
        tokens = [hidden.shape[1]] * self.prompt.batch if last else self.tokens
        self.layer_tokens.append(tokens)
        return hidden

    def _act(self, due: Due, number: int, layer: Any, hidden: Tensor, kwargs: Kwargs) -> Tensor:
        """Collect what is due before a layer, and let steps act; arguments as in `enter`."""
        if due.signals:
            self.decoder_signals.collect(due.signals, number, layer, hidden, kwargs)
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
                    extension.after_step(planned, kwargs.get("past_key_values"))
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
            self._renumbering = Renumbering.of(gone, self.prompt, self._renumbering)
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
        rows = self._rows.get(part.rows)
        if rows is None:
            rows = torch.tensor(part.rows, device=self.prompt.device)[:, None]
            self._rows[part.rows] = rows
        return rows

    def _count_tokens(self) -> list[int]:
        if self.prompt.present is None or not self.groups:
            return [self.prompt.length] * self.prompt.batch
        return self.prompt.present.sum(1).tolist()

    def leave(self, output: Any) -> Any:
        """Bring hidden states and attention maps back to logical length, in place.

        Args:
            output: the text model's output.
        """
        for known in (
            self._views,
            self._positions_by_key,
        ):  # they keep alive what they are known by
            known.clear()
        widen_maps(output, self.family, self._attended, self.prompt.length)
        layouts = (*self.layer_layouts, self.layout)
        widen_states(output, self.full, self._entrance, layouts, self.prompt.length)
        return output
