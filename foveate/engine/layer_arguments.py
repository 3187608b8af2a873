"""LayerArguments: what decoder layers are handed in a forward where columns or slots are missing.

Text models hand their layers masks, rotary embeddings and position ids in logical terms. Here they
become physical: of the columns that exist as queries, and of the slots that exist as keys.
Shapes: `B` batch, `T` logical length of this forward, `P` physical columns, `D` hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from foveate.engine.attentions import Seen
from foveate.engine.cache import PrunedLayer
from foveate.engine.cache_argument import cache_of
from foveate.engine.caches import is_reference, pruned_layer
from foveate.engine.layout import Layout, each_part, take, take_positions
from foveate.engine.long_rope import check_switch
from foveate.engine.mask_translation import translate_mask, translate_padding
from foveate.engine.renumbering import Renumbering, places_in_samples
from foveate.engine.slots import Slots
from foveate.engine.state import Kwargs, Prompt
from foveate.errors import InputError, UnsupportedModelError
from foveate.families import Family


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys that a layer attends to: its own, or those of an earlier layer.

    Args:
        before: their slots before the forward.
        after: their slots after it.
        layout: the columns that they were made of.
        renumbering: what was taken off positions in this forward by the time they were made.
    """

    before: Slots
    after: Slots
    layout: Layout
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


class LayerArguments:
    """The arguments of the layers of one forward.

    Nothing here holds on to a layer of the cache: that must go when the cache does.

    Args:
        family: the model's family.
        prompt: what the forward is about.
        full: the layout in which nothing is missing.
    """

    def __init__(self, family: Family, prompt: Prompt, full: Layout) -> None:
        self.family, self.prompt, self.full = family, prompt, full
        self.fresh = Slots.full(prompt.batch, prompt.past, prompt.device)
        self.remembers = True  # else nobody asks again, as where a checkpoint runs layers anew
        self.attended: dict[int, Seen] = {}  # what layers attend with, where columns are missing
        self._keys: dict[int, Keys] = {}
        self._views: dict[tuple[int, ...], View] = {}
        self._positions: dict[tuple[int, ...], tuple[Any, Tensor | None, tuple[Any, ...]]] = {}
        self._unpruned: dict[int, Keys] = {}  # keys of earlier layers that lack nothing
        self._paddings: dict[tuple[int, int], tuple[Tensor | None, tuple[Any, ...]]] = {}
        self._last: Layout | None = None  # where layers are given the last columns alone

    def forget(self) -> None:
        """Let go of what views are known by; a checkpoint waits for the end of some of it."""
        for known in (self._views, self._positions, self._paddings):
            known.clear()

    # -- layers without keys

    def of_state(self, layout: Layout, kwargs: Kwargs) -> Kwargs:
        """Keyword arguments of a layer that mixes its columns into a running state.

        Args:
            layout: its columns.
            kwargs: its keyword arguments, in logical terms.

        Raises:
            InputError: padding would come between the state and the columns, and fade the state.
        """
        if layout is self.full:
            return kwargs
        if layout.ragged and self.prompt.past:
            raise InputError(
                f"rows of this batch keep different numbers of tokens after a KV cache, so padding "
                f"would run through the recurrent layers of {self.family.model_type}; give every "
                "row as many visual tokens and as much text, or run the rows one by one"
            )
        named = layout, kwargs.get("attention_mask")
        key = id(layout), id(named[1])
        if key not in self._paddings:  # layers share it
            self._paddings[key] = translate_padding(named[1], layout), named
        return {**kwargs, "attention_mask": self._paddings[key][0]}

    # -- layers with keys

    def is_unpruned(self, number: int, cache: Any) -> bool:
        """Whether no slot of a layer's keys is missing."""
        if (donor := self.family.donors[number]) != number:
            return donor not in self._keys
        held = cache.layers[number] if cache is not None and len(cache.layers) > number else None
        images = self.prompt.visual is not None
        return not isinstance(held, PrunedLayer) and not (images and is_reference(held))

    def translate(
        self,
        number: int,
        layout: Layout,
        renumbering: Renumbering | None,
        hidden: Tensor,
        kwargs: Kwargs,
        *,
        tracked: bool = False,
    ) -> tuple[Any, Slots, Kwargs]:
        """What a layer is handed in physical terms; its cache learns which columns it gets.

        Args:
            number: the decoder layer.
            layout: the columns that there are.
            renumbering: what is taken off their positions.
            hidden: (B, P, D) its input.
            kwargs: its keyword arguments, in logical terms.
            tracked: whether the cache is to know which slots hold visual tokens.

        Returns:
            The layer of the cache with its keys, or `None`; the slots of these after the forward;
            and the keyword arguments.
        """
        held = self._held(number, layout, cache_of(kwargs))
        keys = self._keys_of(number, layout, renumbering, held, tracked)
        count = hidden.shape[1]
        queries = layout if count == layout.index.shape[1] else self._last_columns(layout, count)
        view = self._view(number, keys, held, queries, hidden, kwargs)
        self.attended[number] = view.seen
        kwargs = {**kwargs, **view.changes}
        if queries is layout and layout is not self.full:
            for name in self.family.per_position:
                if (value := kwargs.get(name)) is not None:
                    kwargs[name] = take(value, layout.index.clamp(min=0))
        return held, keys.after, kwargs

    def _held(self, number: int, layout: Layout, cache: Any) -> Any:
        """The cache layer with the keys of a layer, made a pruned one if they are its own."""
        if cache is None:
            return None
        if (donor := self.family.donors[number]) != number:
            return cache.layers[donor]
        return pruned_layer(cache, number, self.fresh, self.prompt.length - layout.index.shape[1])

    def _keys_of(
        self,
        number: int,
        layout: Layout,
        renumbering: Renumbering | None,
        held: Any,
        tracked: bool,
    ) -> Keys:
        length, donor = self.prompt.length, self.family.donors[number]
        if donor != number:
            if donor in self._keys:
                return self._keys[donor]
            if donor not in self._unpruned:
                window = getattr(held, "sliding_window", None)
                before = self.fresh if window is None else self.fresh.last(window - 1)
                after = before.extend(self.full, length, None)
                self._unpruned[donor] = Keys(before, after, self.full, None)
            return self._unpruned[donor]
        before = self.fresh if held is None else held.slots
        total = None if renumbering is None else renumbering.total
        after = before.extend(layout, length, total, self.prompt.visual if tracked else None)
        if held is not None:
            held.incoming = after
        keys = self._keys[number] = Keys(before, after, layout, renumbering)
        return keys

    def _last_columns(self, layout: Layout, count: int) -> Layout:
        """The last columns, where the text model goes on with these alone. They are the last
        positions too, and numbered from the first of them.

        Raises:
            InputError: some of the last positions were removed.
        """
        if self._last is None or self._last.index.shape[1] != count:
            index = layout.index[:, -count:] - (self.prompt.length - count)
            if not bool((index == torch.arange(count, device=index.device)).all()):
                raise InputError(
                    f"later layers go on with the last {count} tokens alone, but some of these are "
                    "visual tokens that were removed; use a smaller logits_to_keep, and "
                    "prefill_chunk_size=None"
                )
            self._last = Layout(index, ragged=False)
        return self._last

    def _view(
        self, number: int, keys: Keys, held: Any, queries: Layout, hidden: Tensor, kwargs: Kwargs
    ) -> View:
        """What layers are handed that share keys, columns and arguments."""
        # The mask and the rotary embedding differ between kinds of layers in some models.
        mask, rotary = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        named = type(held), keys.before, keys.after, keys.renumbering, queries, mask, rotary
        key = tuple(map(id, named))
        view = self._views.get(key)
        if view is None:
            width = held.max_cache_len if isinstance(held, StaticLayer) else 0
            length = queries.index.shape[1] if queries is self._last else self.prompt.length
            rotary, position_ids = self.positions(number, keys, queries, hidden, kwargs)
            foreign = queries is not keys.layout
            if foreign and queries is not self._last and self.prompt.flash:
                raise self._unaligned(number)
            physical = {
                "attention_mask": translate_mask(
                    mask,
                    queries,
                    keys.after,
                    length,
                    two_d=self.prompt.flash,
                    width=width,
                    foreign=foreign,
                    causal=self.family.causal,
                ),
                "position_embeddings": rotary,
                "position_ids": position_ids,
            }
            changes = {n: value for n, value in physical.items() if value is not kwargs.get(n)}
            view = View(changes, Seen.of(queries, keys.after, held, length), named)
            if self.remembers:
                self._views[key] = view
        return view

    def _unaligned(self, number: int) -> UnsupportedModelError:
        donor, kernel = self.family.donors[number], self.family.text.config._attn_implementation
        return UnsupportedModelError(
            f"layer {number} of this {self.family.model_type} reads the keys of layer {donor}, "
            f"from which fewer tokens were removed, and {kernel!r} attention takes no mask that "
            "says which of them come later; set the attention to 'sdpa', or remove tokens before "
            f"layer {donor}"
        )

    # -- positions

    def positions(
        self, number: int, keys: Keys, queries: Layout, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Any, Tensor | None]:
        """Rotary embeddings and position ids of a layer's columns, as its keys are numbered."""
        rotary, position_ids = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        earlier = keys.before.renumbered
        if queries is self.full and keys.renumbering is None and earlier is None:
            return rotary, position_ids
        named = queries, earlier, keys.renumbering, rotary, position_ids
        key = tuple(map(id, named))
        found = self._positions.get(key)
        if found is None:
            found = *self._make_positions(number, keys, queries, hidden, kwargs), named
            if self.remembers:
                self._positions[key] = found
        return found[:2]

    def _make_positions(
        self, number: int, keys: Keys, queries: Layout, hidden: Tensor, kwargs: Kwargs
    ) -> tuple[Any, Tensor | None]:
        rotary, positions = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        last = queries is self._last  # whose rotary embeddings the text model has cut already
        count, columns = queries.index.shape[1], queries.index.clamp(min=0)
        if positions is not None and last:
            positions = positions[..., -count:]
        elif positions is not None and queries is not self.full:
            positions = take_positions(positions, columns)
        shift, earlier = keys.renumbering, keys.before.renumbered
        handed = positions is not None
        if shift is not None or earlier is not None:
            if positions is None:  # layers of ModernBERT are handed rotary embeddings alone
                positions = take_positions(self.prompt.positions, columns)
            if shift is not None:
                off = shift.shift[:, -count:] if last else shift.shift.gather(1, columns)
                positions = positions - off
            if earlier is not None:
                positions = positions - earlier
            check_switch(self.family, positions, self.prompt.past)
            rotary = self.family.rotary(hidden, positions, number)
        elif rotary is not None and not last:
            rotary = each_part(rotary, lambda part: take(part, columns))
        # Flash kernels read gaps in the position ids of a single row as packed sequences.
        if self.prompt.flash:
            positions = places_in_samples(self.prompt.sample, columns)
        return rotary, positions if handed else None
