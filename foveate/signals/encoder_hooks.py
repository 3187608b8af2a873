"""Hooks that collect the signals of a vision encoder while it runs.

Shapes: `B` images, `S` special tokens before the `V` patches, `N = S + V`, `H` heads.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foveate.families import Encoder
from foveate.signals import SIGNALS, EncoderSignal
from foveate.signals.clip import ClipQuestions
from foveate.signals.projections import Projections
from foveate.signals.rotary import rotated


class Shortened(Protocol):
    """A pass through an encoder in which tokens are removed."""

    @property
    def bias(self) -> Tensor | None:
        """What the scores of each key get."""

    @property
    def order(self) -> Tensor | None:
        """Which of all rows each row of now is, ascending; `None` while all are there."""

    def widen(self, row: Tensor) -> Tensor:
        """(B, C, V) of a signal of the surviving tokens."""

    def unpruned(self, states: Tensor) -> Tensor:
        """Rows of now at full length."""


class Attaching(Protocol):
    """What hooks are put on with, and taken off again."""

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before a module's forward."""

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs, output)` after a module's forward."""

    def tap(self, parent: nn.Module, name: str, hook: Callable[..., Any]) -> None:
        """The same for whatever child of a module has a name."""


class EncoderSignals:
    """Collects signals while an encoder runs.

    Args:
        encoder: the encoder.
        wanted: signal -> 0-based layers.
        running: gives the pass that this thread is in, where tokens are removed inside the encoder.
        threshold: how many times the mean global patches receive at least.
    """

    def __init__(
        self,
        encoder: Encoder,
        wanted: Mapping[str, tuple[int, ...]],
        running: Callable[[], Shortened | None] = lambda: None,
        threshold: float = 0.0,
    ) -> None:
        self.encoder = encoder
        self.threshold = threshold
        self.wanted = wanted
        self._pass = running
        self._running = threading.local()

    @property
    def count(self) -> int:
        """Signals of all layers together."""
        return sum(len(layers) for layers in self.wanted.values())

    def attach(self, on: Attaching) -> None:
        """Hook the projections of the layers, and the layers themselves."""
        for number in sorted({i for layers in self.wanted.values() for i in layers}):
            layer: Any = self.encoder.layers[number]
            signals = [signal_of(n) for n, layers in self.wanted.items() if number in layers]
            if states := [signal for signal in signals if signal.of_states is not None]:
                on.after(layer, self._after(number, states))
            if projected := [signal for signal in signals if signal.of_projections is not None]:
                on.before(layer, functools.partial(self._note, number))
                attention = self.encoder.attention(layer)
                parts = self.encoder.projections
                if any(signal.values for signal in projected) and len(parts) > 1:
                    parts = (*parts, self.encoder.values)
                for part in parts:
                    hook = self._projection(number, part, parts, projected)
                    on.tap(attention, part, hook)

    @contextmanager
    def collect(self) -> Iterator[dict[tuple[str, int], Tensor]]:
        """While open, fill a dict of (signal, layer) -> (images, C, V), in this thread only."""
        rows: dict[tuple[str, int], Tensor] = {}
        self._running.rows, self._running.pending = rows, {}
        self._running.number = -1
        try:
            yield rows
        finally:
            self._running.rows = None

    def deliver(self, name: str, values: Tensor, clip: ClipQuestions | None = None) -> Tensor:
        """(G, L, C, V) as collected, as the signal is for methods; `clip` holds the questions."""
        signal = signal_of(name)
        values = signal.shape(values, self.encoder.heads_of(values.shape[2]))
        return values if signal.of_states is None else signal.of_states(values, clip)

    def _note(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Before a layer: what it is told, whether or not its attention is called as a module."""
        if getattr(self._running, "rows", None) is not None:
            self._running.number = number
            by_place = zip(self.encoder.by_place, args[1:], strict=False)
            self._running.told = {**kwargs, **dict(by_place)}

    @property
    def _bias(self) -> Tensor | None:
        """What the scores of each key get in the layer that is running; `None` for nothing."""
        shortened = self._pass()
        if shortened is not None and shortened.bias is not None:
            return shortened.bias
        mask = self._running.told.get("attention_mask")
        if self.encoder.packed is not None and not self.encoder.padded:
            return None  # the mask keeps images apart
        if mask is None:
            return None
        hidden, least = hides(mask), torch.finfo(torch.float32).min
        return torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, least)[
            :, None, None
        ]

    @torch.no_grad()  # within a checkpoint, nothing may be saved that is not when it runs again
    def _keep(self, signal: EncoderSignal, number: int, row: Tensor) -> None:
        shortened = self._pass()
        self._running.rows[signal.name, number] = row if shortened is None else shortened.widen(row)

    def _after(self, number: int, signals: list[EncoderSignal]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if getattr(self._running, "rows", None) is not None:
                states = self._states(output)
                for signal in signals:
                    self._keep(signal, number, states)

        return hook

    def _states(self, output: Any) -> Tensor:
        """(B, C, V) of what a layer returns."""
        states = self.encoder.states_in(output).detach()
        return self._first(states)[:, self.encoder.special :].transpose(1, 2)

    def _first(self, states: Tensor) -> Tensor:
        """(B, N, D) states with all special rows before the patches."""
        shortened = self._pass()
        if shortened is not None and shortened.order is not None:
            return states  # they are
        return self.encoder.specials_first(states)

    def _projection(
        self, number: int, part: str, parts: tuple[str, ...], signals: list[EncoderSignal]
    ) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if getattr(self._running, "rows", None) is None or self._running.number != number:
                return  # or projected for a step before the layer, which is yet to run
            pending = self._running.pending.setdefault(number, {})
            pending[part] = output.detach()
            if len(pending) == len(parts):
                del self._running.pending[number]
                projections = self._projections([pending[p] for p in parts])
                for signal in signals:
                    assert signal.of_projections is not None
                    self._keep(signal, number, signal.of_projections(projections))

        return hook

    def _projections(self, parts: list[Tensor]) -> Projections:
        """Of queries, keys, and values if a signal reads them."""
        query, key, *values = (self._first(part) for part in self.encoder.projected(parts))
        value, special = values[0] if values else None, self.encoder.special
        heads = self.encoder.heads_of(query.shape[-1])
        rotary = self._running.told.get("position_embeddings")
        turned = rotated(query, rotary, heads), rotated(key, rotary, heads)
        return Projections(*turned, value, heads, special, self._bias, self.threshold, key)


def signal_of(name: str) -> EncoderSignal:
    """The signal of encoder layers that has a name."""
    signal = SIGNALS[name]
    assert isinstance(signal, EncoderSignal)  # as the plan has checked
    return signal


def hides(mask: Tensor) -> Tensor:
    """(B or 1, N) rows that a mask hides from all others."""
    keys = mask if mask.dim() == 2 else mask[:, 0, 0]
    return keys < 0 if keys.is_floating_point() else keys == 0
