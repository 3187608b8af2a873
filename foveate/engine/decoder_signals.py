"""Decoder signals: what steps between decoder layers can read of the tokens.

Signals are collected just before a layer runs, or while it runs, and given to the steps that need
them, at the tokens that are alive there. How each is computed, `foveate.signals.decoder` says.
Shapes: `B` rows, `P` physical columns, `G` images of a group, `V` tokens of each, `Q` text tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.core import Need
from foveate.engine.images import ImageGroup
from foveate.engine.inputs import from_first
from foveate.engine.layout import Layout, Slots
from foveate.engine.prompt import Asked, starts
from foveate.engine.question import Question
from foveate.engine.readout import prompt_ends
from foveate.engine.state import ForwardState
from foveate.errors import InputError
from foveate.signals import SIGNALS, DecoderSignal
from foveate.signals.layer_view import LayerView


class DecoderSignals:
    """Signals of one forward.

    Args:
        state: the forward.
    """

    def __init__(self, state: ForwardState) -> None:
        self.state = state
        self.prompt = state.prompt
        self._collected: dict[tuple[DecoderSignal, int], tuple[Tensor, Layout]] = {}
        self._of_input: dict[tuple[DecoderSignal, int], Tensor] = {}  # signal, image
        self._layer_input: _LayerInput | None = None  # of the layer that is about to run

    def collect(
        self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any], later: bool = False
    ) -> None:
        """Collect what steps need of a layer that is about to run: what those before it need, of
        what is there; and `later`, once they have acted, what those before later layers need, of
        what the layer will see.

        Args:
            number: the decoder layer.
            layer: its module.
            hidden: (B, P, D) its input.
            kwargs: its keyword arguments, in logical terms.
            later: for which of them.
        """
        if not later:
            self._collect_of_input(number, hidden.detach())
        for signal in self._due(number, operator.gt if later else operator.eq):
            if signal.before_layer is None or self._is_collected(signal, number):
                continue
            view = self._layer_input
            if view is None or view.number != number or view.layout is not self.state.layout:
                view = self._layer_input = _LayerInput(self, number, layer, hidden, kwargs)
            self._collected[signal, number] = signal.before_layer(view), self.state.layout
        if later:  # it holds what a recomputation of the layer is known by
            self._layer_input = None

    def _collect_of_input(self, number: int, hidden: Tensor) -> None:
        """Collect what is told of the input of the language model, for all later steps."""
        for signal in self._due(number):
            if signal.of_input is None:
                continue
            text = self.at_text(hidden)
            for group in self.state.groups:
                rows = self.state.row_index(group)
                visual = hidden[rows, self.state.columns_of(group, self.state.layout)]
                values = signal.of_input(visual, text[rows[:, 0]], self.text_mask(group))
                keys = ((signal, image) for image in group.numbers)
                self._of_input |= dict(zip(keys, values, strict=True))

    def collect_module(self, number: int, given: Tensor, made: Tensor) -> None:
        """Collect what a module of a layer made of its input, both (B, P, D)."""
        for signal in self._due(number):
            if signal.of_module is None:
                continue
            if self.prompt.sample is not None:
                raise InputError(
                    "how much layers change a token is told among all tokens of a row, so packed "
                    "samples would see each other; leave packing off, or use another method"
                )
            real = self._prompted
            if real is None:
                real = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
            before, _ = self._collected.get((signal, number), (0, None))
            now = before + signal.of_module(given, made, real.to(given.device))
            self._collected[signal, number] = now, self.state.layout

    def of(self, needs: tuple[Need, ...], group: ImageGroup) -> dict[str, Tensor]:
        """Signals of a group, at the tokens that are alive of it."""
        images = _ImageTokens(self, group)
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
                signals[need.name] = torch.stack(found, 1)
        return signals

    def _at(self, signal: DecoderSignal, number: int, images: _ImageTokens) -> Tensor:
        """A signal of one layer, (G, ...) at the tokens alive of a group."""
        collected, layout = self._collected[signal, number]
        group, axis = images.group, signal.column_axis
        rows = self.state.row_index(group).to(collected.device)
        if axis is None:
            return signal.finish(collected[rows[:, 0]], images)
        columns = self.state.columns_of(group, layout).to(collected.device)
        values = collected.movedim(axis, 1)[rows, columns]
        if (seen := self.state.seen(group)) is not None:  # nothing is told of what callers hide
            hidden = ~seen.to(collected.device)[(...,) + (None,) * (values.dim() - 2)]
            values = values.masked_fill(hidden, signal.hidden_value)
        return signal.finish(values.movedim(1, axis), images)

    # -- what is due

    def _due(
        self, number: int, chosen: Callable[[int, int], bool] = operator.ge
    ) -> list[DecoderSignal]:
        """Signals of a layer that some step needs which removes anything; `chosen` compares the
        layer of a step with it.
        """
        signals = self.state.plan.decoder_signals.get(number, {})
        return [
            signal
            for signal, steps in signals.items()
            if any(self._drops(s) for s in steps if chosen(s.step.layer, number))
        ]

    def _is_collected(self, signal: DecoderSignal, number: int) -> bool:
        """Whether a signal of a layer was collected of what is there now."""
        collected = self._collected.get((signal, number))
        return collected is not None and collected[1] is self.state.layout

    def _drops(self, planned: Any) -> bool:
        if planned.method.adaptive:
            return any(group.index.shape[1] for group in self.state.groups)
        return any(
            0 < count < group.index.shape[1]
            for group in self.state.groups
            for count in group.by_count(planned)
        )

    def without_query(self, needs: tuple[Need, ...], group: ImageGroup) -> set[int]:
        """Members of a group about which nothing is asked that a step needs to know.

        So it is with images behind which nothing is supervised; such a step leaves them alone.
        """
        signals = [_signal_of(need) for need in needs]
        query = any(signal.query for signal in signals)
        text = any(signal.text and signal.depends_on_prompt for signal in signals)
        if self.prompt.supervised is None or not (query or text):
            return set()
        asks = torch.ones(len(group.images), dtype=torch.bool, device=self.prompt.device)
        if query:
            asks &= self.query_tokens.of(*self.ends_of(group)).any(1)
        if text:
            asks &= self.text_mask(group).any(1)
        return {i for i, asked in enumerate(asks.tolist()) if not asked}

    # -- layers

    def view(
        self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[LayerView, Slots]:
        """What a layer that is about to run attends with, and the slots of the keys that it has
        cached; arguments as in `collect`.
        """
        state, prompt = self.state, self.prompt
        cache = kwargs.get("past_key_values")
        held = cache.layers[number] if cache is not None and len(cache.layers) > number else None
        before = state.slots_of(cache, number)
        rotary = None
        if state.family.rotates(number):
            rotary, _ = state.positions(number, before, hidden, kwargs)
        past = None
        if held is not None and prompt.past:
            before = before.last(held.keys.shape[2])  # all that a layer with a window holds
            past = held.keys[:, :, : before.count]
        return LayerView(layer, hidden, rotary, past), before

    def from_first(
        self, number: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Keyword arguments with positions counted from the first token of each row; `None` where
        they are so.
        """
        prompt, family = self.prompt, self.state.family
        positions = from_first(kwargs.get("position_ids"), prompt.real, prompt.past)
        if positions is None or not family.one_dimensional:
            return None
        rotary = family.rotary(hidden, positions, number)
        return {**kwargs, "position_ids": positions, "position_embeddings": rotary}

    def visible_past(self, columns: Tensor, past: Slots) -> Tensor | None:
        """(B, Q or 1, S) cached slots that tokens in (B, Q) logical columns see, or `None` for
        all.
        """
        real = self.prompt.real
        if real is None and not past.ragged and self._window is None:
            return None
        seen = (past.index >= 0)[:, None]
        if real is not None:
            seen = seen & real.gather(1, past.index.clamp(min=0))[:, None]
        if self._window is not None:
            asking = columns[..., None] + self.prompt.past
            seen = seen & (past.index[:, None] > asking - self._window)
        return seen

    @property
    def _window(self) -> int | None:
        """Positions that a token sees at most, where there are more."""
        window, total = self.state.family.window, self.prompt.past + self.prompt.length
        return window if window is not None and window < total else None

    # -- columns

    @cached_property
    def query_tokens(self) -> Asked:
        """The query tokens."""
        prompt, real = self.prompt, self._real
        if prompt.supervised is not None:
            return Asked.before_spans(prompt.supervised, real, prompt.sample)
        if prompt.sample is not None:
            return Asked.last_of_samples(prompt.sample)
        asked = Asked.last(prompt.batch, prompt.length, real, prompt.trailing)
        return replace(asked, columns=asked.columns.to(prompt.device))

    @property
    def question_tokens(self) -> int:
        """Text tokens behind images that were looked at, in the longest row; 0 if none were."""
        text = vars(self).get("question_text")
        return 0 if text is None else text.columns.shape[1]

    @property
    def without_text(self) -> tuple[int, ...]:
        """Rows in which no text followed an image that was looked at by its text."""
        text = vars(self).get("question_text")
        return () if text is None else text.without

    @cached_property
    def question_text(self) -> Question:
        """The text behind the images, as far as it is not supervised."""
        prompt, real = self.prompt, self._real
        assert prompt.visual is not None  # there are images, or nobody would ask
        if prompt.supervised is not None:
            real = ~prompt.supervised if real is None else real & ~prompt.supervised
        rows = [row for group in prompt.groups for row in group.rows]
        ends = [end for group in prompt.groups for end in group.ends]
        last = None
        if prompt.supervised is None:
            last = prompt_ends(prompt.visual, real, prompt.trailing, prompt.sample)
        return Question.of(prompt.visual, real, prompt.trailing, rows, ends, prompt.sample, last)

    @property
    def _real(self) -> Tensor | None:
        """(B, T) positions of this forward that are no padding, or `None` for all."""
        real = self.prompt.real
        return None if real is None else real[:, self.prompt.past :]

    def physical(self, columns: Tensor) -> Tensor:
        """Columns that stand for logical ones: the nearest alive at or before each."""
        index = self.state.layout.index.contiguous()
        found = torch.searchsorted(index, columns.contiguous(), right=True) - 1
        return found.clamp(min=0)

    @property
    def _alive(self) -> Tensor | None:
        """(B, P) columns that are no padding, or `None` for all."""
        real, layout = self._real, self.state.layout
        if real is None:
            return layout.index >= 0 if layout.ragged else None
        return real.gather(1, layout.index.clamp(min=0)) & (layout.index >= 0)

    def visible_to(self, columns: Tensor) -> Tensor:
        """(B, Q, P) physical columns that tokens in (B, Q) logical ones see."""
        seen = self._known_to(columns)
        if self._window is None:
            return seen
        return seen & (self.state.layout.index[:, None] > columns[..., None] - self._window)

    def _known_to(self, columns: Tensor) -> Tensor:
        """The same, whether or not they lie within a window."""
        index, sample = self.state.layout.index, self.prompt.sample
        if self.prompt.sees is None:
            seen = index[:, None] <= columns[..., None]
        else:
            sees = self.prompt.sees.expand(len(index), -1, -1)
            sees = sees[torch.arange(len(index), device=sees.device)[:, None], columns]
            seen = sees.gather(2, index.clamp(min=0)[:, None].expand(-1, columns.shape[1], -1))
        if self._alive is not None:
            seen = seen & self._alive[:, None]
        if sample is not None:
            own = sample.gather(1, index.clamp(min=0))
            seen = seen & (own[:, None] == sample.gather(1, columns)[..., None])
        return seen

    @property
    def visible_to_query(self) -> Tensor | None:
        """(B, Q, P) columns that the tokens that ask see, or `None` for all."""
        if self._plain and self._window is None:
            return None
        return self.visible_to(self.query_tokens.columns)

    @property
    def _plain(self) -> bool:
        """Whether the tokens that ask are the last of their rows, and these are all there is."""
        prompt = self.prompt
        usual = prompt.supervised is None and prompt.sample is None
        plain = usual and not prompt.trailing and prompt.sees is None
        return plain and self._alive is None

    @property
    def _prompted(self) -> Tensor | None:
        """(B, P) columns of the prompt: neither drafted nor supervised; `None` for all."""
        prompt, index = self.prompt, self.state.layout.index
        if prompt.supervised is None:
            return None if self._plain else self._known_to(self.query_tokens.columns)[:, 0]
        told = ~prompt.supervised.gather(1, index.clamp(min=0))
        return told if self._alive is None else told & self._alive

    def at_text(self, states: Tensor) -> Tensor:
        """(B, Q, ...) of (B, P, ...) at the text after images."""
        columns = self.physical(self.question_text.columns).to(states.device)
        return states[torch.arange(len(columns), device=states.device)[:, None], columns]

    def ends_of(self, group: ImageGroup) -> tuple[Tensor, Tensor]:
        """(G) rows of a group's images, and (G) columns at which they end."""
        rows = self.state.row_index(group)[:, 0]
        return rows, torch.tensor(group.ends, device=rows.device)

    def text_mask(self, group: ImageGroup) -> Tensor:
        """(G, Q) which text comes after each image of a group."""
        return self.question_text.mask(*self.ends_of(group))


def _signal_of(need: Need) -> DecoderSignal:
    """The signal that a step between decoder layers needs."""
    signal = SIGNALS[need.name]
    assert isinstance(signal, DecoderSignal)  # as the plan has checked
    return signal


class _LayerInput:
    """A decoder layer about to run, as signals read it; arguments as in `DecoderSignals.collect`.

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
        self._signals = signals
        self._arguments = number, layer, hidden, kwargs
        self.view, self._past = signals.view(*self._arguments)

    @cached_property
    def counted_view(self) -> LayerView:
        number, layer, hidden, kwargs = self._arguments
        counted = self._signals.from_first(number, hidden, kwargs)
        if counted is None:
            return self.view
        return self._signals.view(number, layer, hidden, counted)[0]

    @property
    def query_columns(self) -> Tensor:
        return self._signals.physical(self._signals.query_tokens.columns)

    @property
    def text_columns(self) -> Tensor:
        return self._signals.physical(self._signals.question_text.columns)

    def query_attention(self) -> Tensor:
        signals = self._signals
        cached = signals.visible_past(signals.query_tokens.columns, self._past)
        return self.view.attention(self.query_columns, signals.visible_to_query, cached)

    def text_attention(self) -> Tensor:
        signals, columns = self._signals, self._signals.question_text.columns
        cached = signals.visible_past(columns, self._past)
        return self.view.attention(self.text_columns, signals.visible_to(columns), cached)

    def at_text(self, states: Tensor) -> Tensor:
        return self._signals.at_text(states)

    @torch.no_grad()
    def final_norm(self, states: Tensor) -> Tensor:
        return self._signals.state.family.text.norm(states)


@dataclass(frozen=True, eq=False)
class _ImageTokens:
    """The images of a group, as signals read them."""

    signals: DecoderSignals
    group: ImageGroup

    @property
    def columns(self) -> Tensor:
        assert self.group.columns is not None
        return self.group.columns

    @property
    def text_columns(self) -> Tensor:
        return self.signals.question_text.columns[self.signals.state.row_index(self.group)[:, 0]]

    @cached_property
    def text_mask(self) -> Tensor:
        return self.signals.text_mask(self.group)

    def positions(self, columns: Tensor) -> Tensor:
        prompt, rows = self.signals.prompt, self.signals.state.row_index(self.group)
        if prompt.sample is not None:
            return columns - starts(prompt.sample)[rows, columns]
        columns = columns + prompt.past
        real = prompt.real
        return columns if real is None else (real.long().cumsum(1) - 1)[rows, columns]

    def query_mean(self, values: Tensor) -> Tensor:
        query = self.signals.query_tokens
        if query.real is None:
            return values[:, :, 0]
        asks = query.of(*self.signals.ends_of(self.group)).to(values.device)[:, None, :, None]
        return values.masked_fill(~asks, 0.0).sum(2) / asks.sum(2).clamp(min=1)
