"""Decoder signals: what steps between decoder layers can read of the tokens.

Signals are collected just before a layer runs, or while it runs, and given to the steps that need
them, at the tokens that survive until there. How each is computed, `foveate.signals.decoder` says.
Shapes: `B` rows, `P` physical columns, `G` images of a group, `V` tokens of each, `Q` text tokens.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.core import Learning, Need
from foveate.engine.cache_argument import cache_of
from foveate.engine.images import ImageGroup
from foveate.engine.layout import Layout
from foveate.engine.masks import from_first
from foveate.engine.plan import PlannedStep, Wanted
from foveate.engine.prompt import starts
from foveate.engine.prompt_columns import PromptColumns
from foveate.engine.slots import Slots
from foveate.engine.state import ForwardState
from foveate.errors import InputError
from foveate.families.decoder_layer import last_norm_of
from foveate.signals import SIGNALS, DecoderSignal
from foveate.signals.latent_view import view_of
from foveate.signals.layer_view import LayerView
from foveate.signals.signal import over_layers


class DecoderSignals:
    """Signals of one forward.

    Args:
        state: the forward.
    """

    def __init__(self, state: ForwardState) -> None:
        self.state = state
        self.prompt = state.prompt
        self.columns = PromptColumns(state)
        self._collected: dict[tuple[DecoderSignal, int], tuple[Tensor, Layout]] = {}
        self._of_input: dict[tuple[DecoderSignal, int], Tensor] = {}  # signal, image

    def collect(
        self,
        wanted: Wanted,
        number: int,
        layer: Any,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        """Collect what steps need of a layer that is about to run, as it is now.

        Args:
            wanted: the signals, and which steps need them.
            number: the decoder layer.
            layer: its module.
            hidden: (B, P, ...) its input.
            kwargs: its keyword arguments, in logical terms.
        """
        about: _LayerInput | None = None
        layout = self.state.layout
        for signal, steps in wanted.items():
            _, collected = self._collected.get((signal, number), (None, None))
            if collected is layout or not any(map(self._drops, steps)):
                continue
            if signal.of_input is not None:
                self._collect_of_input(signal, self.state.family.embedded(hidden).detach())
            elif signal.before_layer is not None:
                about = about or _LayerInput(self, number, layer, hidden, kwargs)
                self._collected[signal, number] = signal.before_layer(about), layout

    def _collect_of_input(self, signal: DecoderSignal, hidden: Tensor) -> None:
        """Collect what is told of the input of the language model, for all later steps."""
        assert signal.of_input is not None
        text = self.columns.at_text(hidden)
        for group in self.state.groups:
            rows = self.state.row_index(group)
            visual = hidden[rows, self.state.columns_of(group, self.state.layout)]
            values = signal.of_input(visual, text[rows[:, 0]], self.columns.text_mask(group))
            keys = ((signal, image) for image in group.numbers)
            self._of_input |= dict(zip(keys, values, strict=True))

    def collect_module(self, number: int, given: Tensor, made: Tensor) -> None:
        """Collect what a module of a layer made of its input, both (B, P, D)."""
        for signal, steps in self.state.plan.decoder_signals.get(number, {}).items():
            if signal.of_module is None or not any(map(self._drops, steps)):
                continue
            if self.prompt.sample is not None:
                raise InputError(
                    "how much layers change a token is ranked among all tokens of a row, so packed "
                    "samples would see each other; leave packing off, or use another method"
                )
            real = self.columns.of_prompt
            if real is None:
                real = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
            before, _ = self._collected.get((signal, number), (0, None))
            now = before + signal.of_module(given, made, real.to(given.device))
            self._collected[signal, number] = now, self.state.layout

    def of(self, needs: tuple[Need, ...], group: ImageGroup) -> dict[str, Tensor]:
        """Signals of a group, at its surviving tokens."""
        images = _ImageTokens(self.columns, group)
        signals: dict[str, Tensor] = {}
        for need in needs:
            signal = _signal_of(need)
            if signal.text:
                signals["question_mask"] = images.text_mask
            if signal.of_input is not None:
                found = [self._of_input[signal, image] for image in group.numbers]
                signals[need.name] = torch.stack(found)
            elif signal.of_positions is not None:
                signals[need.name] = signal.of_positions(images)
            else:
                found = [self._at(signal, number, images) for number in need.layers]
                signals[need.name] = over_layers(need, found)
        return signals

    def _at(self, signal: DecoderSignal, number: int, images: _ImageTokens) -> Tensor:
        """A signal of one layer, (G, ...) at the surviving tokens of a group."""
        collected, layout = self._collected[signal, number]
        group, axis = images.group, signal.column_axis
        rows = images.rows.to(collected.device)
        if axis is None:
            return signal.finish(collected[rows[:, 0]], images)
        columns = self.state.columns_of(group, layout).to(collected.device)
        values = collected.movedim(axis, 1)[rows, columns]
        if (seen := self.state.seen(group)) is not None:  # nothing is told of what callers hide
            hidden = ~seen.to(collected.device)[(...,) + (None,) * (values.dim() - 2)]
            values = values.masked_fill(hidden, signal.hidden_value)
        return signal.finish(values.movedim(1, axis), images)

    # -- what is due

    def _drops(self, planned: PlannedStep) -> bool:
        """Whether a step removes anything, or learns to."""
        learns = self.prompt.training is not None and isinstance(planned.method, Learning)
        groups = [group for group in self.state.groups if planned.sees(group.audio)]
        if learns or planned.method.adaptive:
            return any(group.index.shape[1] for group in groups)
        return any(
            0 < count < group.index.shape[1]
            for group in groups
            for count in group.by_count(planned)
        )

    def without_query(self, needs: tuple[Need, ...], group: ImageGroup) -> set[int]:
        """Members of a group about which nothing is asked that a step needs to know.

        So it is with images after which nothing is supervised; such a step leaves them alone.
        """
        signals = [_signal_of(need) for need in needs]
        query = any(signal.query for signal in signals)
        text = any(signal.text for signal in signals)
        if self.prompt.supervised is None or not (query or text):
            return set()
        asks = torch.ones(len(group.images), dtype=torch.bool, device=self.prompt.device)
        if query:
            asks &= self.columns.query_tokens.of(*self.columns.ends_of(group)).any(1)
        if text:
            asks &= self.columns.text_mask(group).any(1)
        return {i for i, asked in enumerate(asks.tolist()) if not asked}

    def on(self, state: ForwardState) -> DecoderSignals:
        """The same signals for a copy of the forward; what is collected there is its own."""
        twin = DecoderSignals(state)
        twin._collected, twin._of_input = dict(self._collected), dict(self._of_input)
        return twin

    # -- layers

    @torch.no_grad()
    def attended(self, layer: Any, hidden: Tensor) -> Tensor:
        """(B, P, D) what a layer norms and projects of its input (B, P, ...)."""
        return self.state.family.attended(layer, hidden.detach())

    def view(
        self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[LayerView, Slots]:
        """What a layer that is about to run attends with, and the slots of the keys that it has
        cached.

        Args:
            number: the decoder layer.
            layer: its module.
            hidden: (B, P, D) what it norms and projects.
            kwargs: its keyword arguments, in logical terms.
        """
        state, prompt = self.state, self.prompt
        if number in state.family.keyless_layers:
            return view_of(layer, hidden, None), state.slots_of(None, number)
        cache = cache_of(kwargs)
        held = cache.layers[number] if cache is not None and len(cache.layers) > number else None
        before = state.slots_of(cache, number)
        rotary, positions = state.positions(number, before, hidden, kwargs)
        rotary = rotary if state.family.rotates(number) else None
        past = None
        if held is not None and prompt.past:
            before = before.last(held.keys.shape[2])  # all that a layer with a window holds
            past = held.keys[:, :, : before.count], held.values[:, :, : before.count]
        return view_of(layer, hidden, rotary, past, positions), before

    def from_first(
        self, number: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Keyword arguments with positions counted from the first token of each row; `None` where
        they are so.
        """
        prompt, family = self.prompt, self.state.family
        if not family.one_dimensional:
            return None
        handed = kwargs.get("position_ids")
        given = prompt.positions if handed is None else handed
        positions = from_first(given, prompt.real, prompt.past, family.first_position)
        if positions is None:
            return None
        rotary = family.rotary(hidden, positions, number)
        return {**kwargs, "position_ids": positions, "position_embeddings": rotary}


def _signal_of(need: Need) -> DecoderSignal:
    """The signal that a step between decoder layers needs."""
    signal = SIGNALS[need.name]
    assert isinstance(signal, DecoderSignal)  # as the plan has checked
    return signal


class _LayerInput:
    """A `LayerInput`; arguments as in `DecoderSignals.collect`.

    Args:
        signals: those of the forward.
    """

    def __init__(
        self,
        signals: DecoderSignals,
        number: int,
        layer: Any,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        self.number, self.layout = number, signals.state.layout
        self._signals, self._columns = signals, signals.columns
        hidden = signals.attended(layer, hidden)
        self._arguments = number, layer, hidden, kwargs
        self.view, self._past = signals.view(*self._arguments)

    @cached_property
    def counted_view(self) -> LayerView:
        number, layer, hidden, kwargs = self._arguments
        counted = self._signals.from_first(number, hidden, kwargs)
        if counted is None:
            return self.view
        return self._signals.view(number, layer, hidden, counted)[0]

    @cached_property
    def query_columns(self) -> Tensor:
        return self._columns.physical(self._columns.query_tokens.columns)

    @cached_property
    def text_columns(self) -> Tensor:
        return self._columns.physical(self._columns.question_text.columns)

    def query_attention(self) -> Tensor:
        cached = self._columns.visible_past(self._columns.query_tokens.columns, self._past)
        return self.view.attention(self.query_columns, self._columns.visible_to_query, cached)

    def text_attention(self) -> Tensor:
        logical = self._columns.question_text.columns
        cached = self._columns.visible_past(logical, self._past)
        return self.view.attention(self.text_columns, self._columns.visible_to(logical), cached)

    def at_text(self, states: Tensor) -> Tensor:
        return self._columns.at_text(states)

    @torch.no_grad()
    def final_norm(self, states: Tensor) -> Tensor:
        return last_norm_of(self._signals.state.family.text)(states)


class _ImageTokens:
    """An `ImageTokens`: the images of a group."""

    def __init__(self, columns: PromptColumns, group: ImageGroup) -> None:
        self._columns, self.group = columns, group
        self.rows = columns.state.row_index(group)  # (G, 1)

    @cached_property
    def columns(self) -> Tensor:
        assert self.group.columns is not None
        return self.group.columns

    @cached_property
    def text_columns(self) -> Tensor:
        return self._columns.question_text.columns[self.rows[:, 0]]

    @cached_property
    def text_mask(self) -> Tensor:
        return self._columns.text_mask(self.group)

    def positions(self, columns: Tensor) -> Tensor:
        prompt, rows = self._columns.prompt, self.rows
        if prompt.sample is not None:
            return columns - starts(prompt.sample)[rows, columns]
        columns, real = columns + prompt.past, prompt.real
        return columns if real is None else (real.long().cumsum(1) - 1)[rows, columns]

    def query_mean(self, values: Tensor) -> Tensor:
        query = self._columns.query_tokens
        if query.real is None:
            return values[:, :, 0]
        asks = query.of(*self._columns.ends_of(self.group)).to(values.device)[:, None, :, None]
        return values.masked_fill(~asks, 0.0).sum(2) / asks.sum(2).clamp(min=1)
