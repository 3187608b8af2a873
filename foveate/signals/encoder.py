"""Signals of a vision encoder, from the projections it computes anyway.

One query row costs O(N D) per layer where an attention map costs O(N^2 D). Where all queries are
needed, their rows are summed up in chunks and never held together.
Shapes: `B` pictures, `S` special tokens before the `V` patches, `N = S + V`, `H` heads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foveate.families import Encoder
from foveate.signals.cls_attention import class_row
from foveate.signals.flow import information_flow

FEATURES = ("encoder_features", "clip_patches", "clip_plain_patches")  # states of a layer
CHUNK = 256  # query rows whose attention is held at once
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


@torch.no_grad()
def attention_sums(
    query: Tensor, key: Tensor, heads: int, special: int = 1, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention that patches receive and give, averaged over heads.

    Args:
        query: (B, N, D) projected queries.
        key: (B, N, D) projected keys.
        heads: attention heads, H.
        special: S, rows before the patches.
        bias: (B, 1, 1, N) what the encoder adds to the scores.

    Returns:
        (B, V) mean over all N queries that the encoder does not hide of what each patch receives,
        and (B, V) the share of its attention that each patch gives to patches; float32.
    """
    received, given = torch.zeros(key.shape[:2], device=key.device), []
    for weights in _maps(query, key, heads, bias):
        received += weights.sum(1)
        given.append(weights[..., special:].sum(-1))
    return received[:, special:] / queries(key, bias), torch.cat(given, 1)[:, special:]


def queries(key: Tensor, bias: Tensor | None) -> Tensor | int:
    """How many of (B, N, D) rows ask, (B, 1): those that the encoder's bias does not hide."""
    seen = _visible(bias)
    return key.shape[1] if seen is None else seen.sum(1, keepdim=True)


def _visible(bias: Tensor | None) -> Tensor | None:
    """(B, N) rows that a bias (B, 1, 1, N) does not hide; `None` for all."""
    return None if bias is None else bias[:, 0, 0] > torch.finfo(bias.dtype).min / 2


@torch.no_grad()
def global_attention(
    query: Tensor,
    key: Tensor,
    heads: int,
    special: int = 1,
    bias: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """Attention that patches receive from global rows, averaged over these and over heads.

    Source: VFlowOpt, arXiv:2508.05211.

    Args:
        query: (B, N, D) projected queries.
        key: (B, N, D) projected keys.
        heads: attention heads, H.
        special: S, rows before the patches.
        bias: (B, 1, 1, N) what the encoder adds to the scores.
        threshold: a row is global if it receives more than so many times the mean; without any such
            row all are.

    Returns:
        (B, V) float32.
    """
    received = sum(weights.sum(1) for weights in _maps(query, key, heads, bias))
    assert isinstance(received, Tensor)  # there is at least one row
    votes = received > threshold * (received.sum(1, keepdim=True) / queries(key, bias))
    everybody = torch.ones_like(votes) if (seen := _visible(bias)) is None else seen
    votes |= ~votes.any(1, keepdim=True) & everybody
    share = (votes / votes.sum(1, keepdim=True)).float().split(CHUNK, dim=1)
    maps = _maps(query, key, heads, bias)
    given = sum(torch.bmm(s[:, None], w)[:, 0] for s, w in zip(share, maps, strict=True))
    assert isinstance(given, Tensor)
    return given[:, special:]


def _maps(query: Tensor, key: Tensor, heads: int, bias: Tensor | None) -> Iterator[Tensor]:
    """(B, n, N) float32 attention of a chunk of rows after another, mean over heads; rows that the
    encoder hides give none.
    """
    q = query.unflatten(-1, (heads, -1)).transpose(1, 2) / math.sqrt(query.shape[-1] // heads)
    k = key.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)
    seen = _visible(bias)
    for start in range(0, q.shape[2], CHUNK):
        logits = torch.matmul(q[:, :, start : start + CHUNK], k).float()
        weights = (logits if bias is None else logits + bias).softmax(-1).mean(1)
        yield weights if seen is None else weights * seen[:, start : start + CHUNK, None]
