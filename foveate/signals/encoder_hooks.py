"""Signals of a vision encoder, from the projections it computes anyway.

One query row costs O(N D) per layer where an attention map costs O(N^2 D). Where all queries are
needed, their rows are summed up in chunks and never held together.
Shapes: `B` pictures, `S` special tokens before the `V` patches, `N = S + V`, `H` heads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foveate.families import Encoder
from foveate.signals.attention_maps import attention_sums, global_attention
from foveate.signals.cls_attention import class_row
from foveate.signals.flow import information_flow

FEATURES = ("encoder_features", "clip_patches", "clip_plain_patches")  # states of a layer
ONE_PER_TOKEN = (
    "joint_cls_attention",
    "received_attention",
    "given_attention",
    "global_attention",
    "information_flow",
)


class Shortened(Protocol):
    """A pass through an encoder in which tokens are removed.

    `bias` is what the scores of each key get.
    """

    bias: Tensor | None

    @property
    def order(self) -> Tensor | None:
        """Which of all rows each row of now is, ascending; `None` while all are there."""

    def widen(self, row: Tensor) -> Tensor:
        """(B, C, V) of a signal of the tokens alive."""

    def whole(self, states: Tensor) -> Tensor:
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
        threshold: threshold of the signal `global_attention`.
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
            names = [name for name, layers in self.wanted.items() if number in layers]
            if states := [name for name in names if name in FEATURES]:
                on.after(layer, self._features(number, states))
            if len(states) < len(names):
                on.before(layer, self._note)
                attention = self.encoder.attention(layer)
                parts = self.encoder.projections
                if "information_flow" in names:
                    parts = (*parts, "v_proj")
                for part in parts:
                    hook = self._projection(number, part, parts, names)
                    on.tap(attention, part, hook)

    @contextmanager
    def collect(self) -> Iterator[dict[tuple[str, int], Tensor]]:
        """While open, fill a dict of (signal, layer) -> (pictures, C, V), in this thread only."""
        rows: dict[tuple[str, int], Tensor] = {}
        self._running.rows, self._running.pending = rows, {}
        try:
            yield rows
        finally:
            self._running.rows = None

    def deliver(self, name: str, values: Tensor) -> Tensor:
        """(G, L, C, V) as collected, in the shape that the signal has for methods."""
        if name in ONE_PER_TOKEN:
            return values[:, :, 0]
        if name == "encoder_keys":
            return values.unflatten(2, (self.encoder.heads, -1)).transpose(-1, -2)
        return values.transpose(-1, -2) if name in FEATURES else values

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer: what it is told, whether or not its attention is called as a module."""
        if getattr(self._running, "rows", None) is not None:
            self._running.told = {**kwargs, "attention_mask": args[1]} if len(args) > 1 else kwargs

    @property
    def _bias(self) -> Tensor | None:
        """What the scores of each key get in the layer that is running; `None` for nothing."""
        shortened = self._pass()
        if shortened is not None and shortened.bias is not None:
            return shortened.bias
        mask = self._running.told.get("attention_mask")
        if mask is None or self.encoder.packed is not None or (hidden := hides(mask)) is None:
            return None
        least = torch.finfo(torch.float32).min
        return torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, least)[
            :, None, None
        ]

    def _keep(self, name: str, number: int, row: Tensor) -> None:
        shortened = self._pass()
        self._running.rows[name, number] = row if shortened is None else shortened.widen(row)

    def _features(self, number: int, names: list[str]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if getattr(self._running, "rows", None) is not None:
                states = self._states(output)
                for name in names:
                    self._keep(name, number, states)

        return hook

    def _states(self, output: Any) -> Tensor:
        """(B, C, V) of what a layer returns."""
        states = output if isinstance(output, Tensor) else output[0]
        return states.detach()[:, self.encoder.special :].transpose(1, 2)

    def _projection(self, number: int, part: str, parts: tuple[str, ...], names: list[str]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if getattr(self._running, "rows", None) is None:
                return
            pending = self._running.pending.setdefault(number, {})
            pending[part] = output.detach()
            if len(pending) == len(parts):
                del self._running.pending[number]
                for name, row in self._rows(names, *(pending[p] for p in parts)).items():
                    self._keep(name, number, row)

        return hook

    def _rows(self, names: list[str], *parts: Tensor) -> dict[str, Tensor]:
        """(B, C, V) of each signal of a layer, from queries, keys, and values if needed."""
        query, key = parts[:2]
        special, heads = self.encoder.special, self.encoder.heads
        bias = self._bias
        rows: dict[str, Tensor] = {}
        if "cls_attention" in names:
            rows["cls_attention"] = class_row(query, key, heads, special, bias)
        if "information_flow" in names:
            row = class_row(query, key, heads, special, bias)
            rows["information_flow"] = information_flow(row, parts[2], special, bias)[:, None]
        if "joint_cls_attention" in names:
            rows["joint_cls_attention"] = class_row(query, key, 1, special, bias)
        if "encoder_keys" in names:
            rows["encoder_keys"] = key[:, special:].transpose(1, 2)
        if "received_attention" in names or "given_attention" in names:
            received, given = attention_sums(query, key, heads, special, bias)
            both = {"received_attention": received, "given_attention": given}
            rows |= {name: row[:, None] for name, row in both.items() if name in names}
        if "global_attention" in names:
            row = global_attention(query, key, heads, special, bias, threshold=self.threshold)
            rows["global_attention"] = row[:, None]
        return rows


def hides(mask: Tensor) -> Tensor | None:
    """(B or 1, N) rows that a mask hides from all others; `None` if it hides none."""
    keys = mask if mask.dim() == 2 else mask[:, 0, 0]
    hidden = keys < 0 if keys.is_floating_point() else keys == 0
    return hidden if bool(hidden.any()) else None
