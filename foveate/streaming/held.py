"""What the slots of a stream's cache hold, and how slots are given up.

Every layer holds equally many slots, so that the cache is an ordinary one to the model; which
tokens they are, differs from head to head. Shapes: `H` key-value heads, `S` slots, `n` new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from foveate.engine.cache import PrunedDynamicLayer
from foveate.errors import CacheError

PINNED = -1  # the frame of text before the first one, which always stays
TEXT = -1  # the cell of tokens that show nothing
FRAME, CELL, POSITION = range(3)
PLAIN = ("keys", "values", "is_initialized", "dtype", "device")
"""Attributes of a layer that is not pruned."""


class Held:
    """A cache, and a (3, H, S) table for each layer: frame, cell and position of what slots hold.

    Args:
        cache: an empty one.
    """

    def __init__(self, cache: DynamicCache) -> None:
        self.cache = cache
        self.tables: list[Tensor] = []
        self.count = 0

    @property
    def layers(self) -> list[Any]:
        """The layers of the cache."""
        return self.cache.layers

    @property
    def bytes(self) -> int:
        """Bytes of keys and values, as they are allocated."""
        states = (x for layer in self.layers for x in (layer.keys, layer.values) if x is not None)
        return sum(x.untyped_storage().nbytes() for x in states)

    def check(self) -> None:
        """Refuse to go on where an eviction has broken off half way.

        Raises:
            CacheError: it has.
        """
        held = {table.shape[2] for table in self.tables}
        if held - {self.count}:
            raise CacheError(
                "an eviction of this stream broke off half way through the cache; begin a new one"
            )

    def added(self) -> Tensor:
        """(n) which of the tokens of the last forward have slots, where a method dropped some; the
        layers become ordinary ones again.
        """
        index = None
        for number, layer in enumerate(self.layers):
            if isinstance(layer, PrunedDynamicLayer):
                assert layer.slots is not None
                index = layer.slots.index[0, self.count :] - self.count
                self.layers[number] = plain = DynamicLayer()
                vars(plain).update({n: value for n, value in vars(layer).items() if n in PLAIN})
        if index is not None:
            return index
        size = self.layers[0].keys.shape[2] - self.count
        return torch.arange(size, device=self.layers[0].keys.device)

    def append(self, entries: Tensor) -> None:
        """Note what the last forward has put into slots: (3, n)."""
        if not self.tables:
            heads = [layer.keys.shape[1] for layer in self.layers]
            self.tables = [entries.new_empty(3, count, 0) for count in heads]
        for number, (table, layer) in enumerate(zip(self.tables, self.layers, strict=True)):
            new = entries[:, None].expand(-1, table.shape[1], -1).to(layer.keys.device)
            self.tables[number] = torch.cat((table.to(new), new), 2)
        self.count += entries.shape[1]

    def crop(self) -> None:
        """Forget what no entry has noted."""
        for layer in self.layers:
            if layer.keys is not None and layer.keys.shape[2] > self.count:
                layer.keys = layer.keys[:, :, : self.count].contiguous()
                layer.values = layer.values[:, :, : self.count].contiguous()

    def evict(self, choose: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """Give up slots.

        Args:
            choose: of a layer's table, keys (H, S, d) and values, makes the (H, S') slots that
                stay, ascending; S' is the same in all layers.
        """
        for number, layer in enumerate(self.layers):
            index = choose(self.tables[number], layer.keys[0], layer.values[0])
            layer.keys, layer.values = _slots(layer.keys, index), _slots(layer.values, index)
            table = self.tables[number]
            self.tables[number] = table.gather(2, index.expand(len(table), -1, -1))
        self.count = self.tables[0].shape[2]

    def renumber(self, turn: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        """Close the gaps between positions: slot number s gets position s.

        Args:
            turn: of a layer's number, keys (H, S, d) and by how much the position of each changes,
                (H, S), makes the keys.
        """
        for number, layer in enumerate(self.layers):
            table = self.tables[number]
            new = torch.arange(self.count, device=table.device, dtype=table.dtype)
            layer.keys = turn(number, layer.keys[0], new - table[POSITION])[None]
            table[POSITION] = new


def _slots(states: Tensor, index: Tensor) -> Tensor:
    """(1, H, S', d) of (1, H, S, d) at (H, S') slots."""
    return states.gather(2, index[None, ..., None].expand(-1, -1, -1, states.shape[-1]))
