"""Attention maps and hidden states that come back: from what there was to all that there is.

A removed token attended to nothing and nothing attended to it: its row and its column are zero. Its
states are those of the nearest token before it that was kept.
Shapes: `B` batch, `H` heads, `P` physical queries, `S` physical keys, `T` logical queries, `K`
logical keys, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from foveate.engine.cache import PrunedStaticLayer
from foveate.engine.layout import Layout, expansion, take, tokens_on, tokens_second
from foveate.engine.plan import Plan
from foveate.engine.slots import Slots
from foveate.errors import InputError, UnsupportedModelError
from foveate.families import Family
from foveate.families.text_facts import TextFacts


@dataclass(frozen=True, eq=False)
class Seen:
    """What a decoder layer attended with.

    Args:
        layout: its queries.
        slots: its keys.
        start: logical position of the first key of the unpruned model's map.
        stop: the same after the last.
    """

    layout: Layout
    slots: Slots
    start: int
    stop: int

    @classmethod
    def of(cls, layout: Layout, slots: Slots, held: Any, length: int) -> Seen:
        """What a layer attended with in a forward of `length` tokens, `held` being its layer of the
        cache, or `None`.
        """
        start, stop = 0, slots.length
        if isinstance(held, PrunedStaticLayer):
            stop = held.logical_max
        elif isinstance(held, DynamicSlidingWindowLayer):  # keeps what the next token will see
            start = max(stop - length - (held.sliding_window - 1), 0)
        return cls(layout, slots, start, stop)


def check_maps(plan: Plan, family: Family, arguments: Mapping[str, Any]) -> None:
    """Refuse to hand out attention maps of layers that are computed in parts.

    Args:
        plan: the session's plan.
        family: the model.
        arguments: what the text model is called with.

    Raises:
        InputError: they are asked for.
    """
    config = family.text.config
    asked = arguments.get("output_attentions", getattr(config, "output_attentions", False))
    if plan.work and asked and config._attn_implementation == "eager":
        names = ", ".join(method.slug for method in plan.methods if method.partial_compute(family))
        raise InputError(
            f"output_attentions=True cannot be served with {names}: decoder layers that compute "
            "less of visual tokens make no attention map; leave it out, or use another method"
        )


def widen_maps(output: Any, family: TextFacts, seen: Mapping[int, Seen], length: int) -> None:
    """Bring the attention maps of a text model's output to logical size, in place.

    Args:
        output: the output, whose `attentions` hold (B, H, P, S) of each layer, if any.
        family: the model.
        seen: decoder layer -> what it attended with, of layers in which columns are missing.
        length: T, tokens of this forward.

    Raises:
        UnsupportedModelError: it is not known which map is which layer's.
    """
    maps = output.get("attentions")
    if not maps or not seen:
        return
    numbers = [n for n in range(family.text_layers) if n not in family.keyless_layers]
    if len(maps) != len(numbers):
        raise UnsupportedModelError(
            f"this {family.model_type} returns {len(maps)} attention maps of {len(numbers)} layers "
            "with attention, so that it is not known which is which; leave output_attentions out"
        )
    output.attentions = tuple(
        _widened(of, seen[number], length) if of is not None and number in seen else of
        for number, of in zip(numbers, maps, strict=True)
    )


def widen_states(
    output: Any, full: Layout, entrance: Layout, layouts: Sequence[Layout], length: int, axis: int
) -> None:
    """Bring the hidden states of a text model's output to logical length, in place.

    Args:
        output: the output, with (B, P, D) of its last layer, and of all layers where asked for.
        full: the layout in which nothing is missing.
        entrance: what the first layer kept of its input, all of which it was given.
        layouts: what was there in each layer, and in the end.
        length: T, tokens of this forward.
        axis: that of tokens in the states between layers.
    """
    if all(layout is full for layout in layouts):
        return

    def picked(states: Tensor, columns: Tensor, axis: int) -> Tensor:
        return tokens_on(take(tokens_second(states, axis), columns), axis)

    def widened(states: Tensor | None, layout: Layout, axis: int = axis) -> Tensor | None:
        if layout is full or states is None or states.shape[axis] < layout.index.shape[1]:
            return states  # as they are, or those of the last tokens alone
        return picked(states, expansion(layout, length), axis)

    physical = output.last_hidden_state
    output.last_hidden_state = widened(physical, layouts[-1], 1)
    if output.get("hidden_states") is None:
        return
    first, *inner, last = output.hidden_states
    if entrance is not full and first is not None:
        columns = entrance.index.gather(1, expansion(entrance, length)).clamp(min=0)
        first = picked(first, columns, axis)
    inner = [widened(states, at) for states, at in zip(inner, layouts[:-1], strict=False)]
    last = output.last_hidden_state if last is physical else widened(last, layouts[-1])
    output.hidden_states = first, *inner, last


def _widened(of: Tensor, seen: Seen, length: int) -> Tensor:
    """(B, H, T, K) of a map (B, H, P, S); K as the unpruned model has it."""
    keys = (seen.slots.index - seen.start).clamp(min=-1)
    keys = F.pad(keys, (0, of.shape[-1] - keys.shape[1]), value=-1)
    return spread(of, seen.layout.index, keys, (length, seen.stop - seen.start))


def spread(of: Tensor, queries: Tensor, keys: Tensor, size: tuple[int, int]) -> Tensor:
    """A map with zeros where there was nothing.

    Args:
        of: (B, H, P, S).
        queries: (B or 1, P) row of each query; -1 for those of no token.
        keys: (B or 1, S) column of each key; the same.
        size: (rows, columns) to make.
    """
    for axis, places in ((2, queries), (3, keys)):
        count = size[axis - 2]
        # What belongs nowhere goes after the others, and is cut off.
        places = places.masked_fill(places < 0, count).to(of.device)
        shape = [*of.shape[:2], 1, 1]
        shape[axis] = places.shape[1]
        index = places.view(len(places), 1, *shape[2:]).expand(of.shape)
        shape = [*of.shape]
        shape[axis] = count + 1
        of = of.new_zeros(shape).scatter(axis, index, of).narrow(axis, 0, count)
    return of
