"""Attention of the vision encoder's class token, from the projections the encoder computes anyway.

softmax(q_cls K^T / sqrt(d)) needs one query row: O(N D) per layer instead of O(N^2 D) for an
attention map.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from foveate.models import Encoder


class Shortened(Protocol):
    """A pass through an encoder in which tokens are removed."""

    bias: Tensor | None

    def widen(self, row: Tensor) -> Tensor:
        """(B, H, V) of a signal of the tokens alive."""


class ClassAttention:
    """Collects class-token attention rows while an encoder runs.

    Args:
        encoder: the encoder; it must have a class token.
        layers: 0-based layers to collect, distinct.
        running: gives the pass that this thread is in, where tokens are removed inside the encoder.
    """

    def __init__(
        self,
        encoder: Encoder,
        layers: tuple[int, ...],
        running: Callable[[], Shortened | None] = lambda: None,
    ) -> None:
        self.encoder = encoder
        self.layers = layers
        self._pass = running
        self._running = threading.local()
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Hook the query and key projections of the layers."""
        for layer in self.layers:
            attention: Any = self.encoder.attention(self.encoder.layers[layer])
            for name in self.encoder.projections:
                self._handles.append(
                    getattr(attention, name).register_forward_hook(self._keep(layer, name))
                )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def collect(self) -> Iterator[dict[int, Tensor]]:
        """While open, fill a dict of layer -> (images, H, V) float32 rows, in this thread only."""
        rows: dict[int, Tensor] = {}
        self._running.rows, self._running.pending = rows, {}
        try:
            yield rows
        finally:
            self._running.rows = None

    def _keep(self, layer: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            rows = getattr(self._running, "rows", None)
            if rows is None:
                return
            pending = self._running.pending.setdefault(layer, {})
            pending[name] = output.detach()
            if len(pending) == 2:
                del self._running.pending[layer]
                query, key = (pending[part] for part in self.encoder.projections)
                shortened = self._pass()
                bias = None if shortened is None else shortened.bias
                row = class_row(query, key, self.encoder.heads, self.encoder.special, bias)
                rows[layer] = row if shortened is None else shortened.widen(row)

        return hook


@torch.no_grad()
def class_row(
    query: Tensor, key: Tensor, heads: int, special: int = 1, bias: Tensor | None = None
) -> Tensor:
    """Attention of row 0 to the patches.

    Args:
        query: (B, S + V, D) projected queries; only row 0 is read.
        key: (B, S + V, D) projected keys.
        heads: attention heads, H.
        special: S, rows before the patches.
        bias: (B, 1, 1, S + V) what the encoder adds to the scores.

    Returns:
        (B, H, V) float32 probabilities over all S + V keys, without the columns of the first S.
    """
    batch, length, width = key.shape
    q = query[:, :1].view(batch, 1, heads, -1).transpose(1, 2)
    k = key.view(batch, length, heads, -1).transpose(1, 2)
    logits = torch.matmul(q, k.transpose(-1, -2))[:, :, 0].float() / math.sqrt(width // heads)
    if bias is not None:
        logits = logits + bias[:, 0]
    return logits.softmax(-1)[..., special:]
