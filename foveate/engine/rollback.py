"""Rollback: a forward that dies leaves the key-value cache as it found it.

Layers of a cache are extended one by one, so a forward that is interrupted (out of memory, Ctrl-C)
would leave layers of unequal length, and nobody outside could tell. The same goes for where M-RoPE
models say that positions go on after the cache.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer, StaticLayer

from foveate.engine.caches import WITHOUT_SLOTS, is_known
from foveate.engine.running_state import ReplacedStateLayer

Attributes = dict[str, Any]
ROPE = "rope_deltas"  # how far positions are ahead of the cache's length, on M-RoPE models
STATES = "recurrent_states"  # attribute of cache layers with a running state


class Rollback:
    """What a cache holds before a forward.

    Keys and values that only grow are not held on to, as that would double the memory of the cache
    as long as the forward runs: what was appended is cut off again. A running state is copied, as
    it is written over, unless the model lets it be replaced.

    Args:
        cache: the cache; layers of running states that can be replaced become such as are.
        past: its logical length.
        rewritten: whether the forward may let layers forget what they hold.
        replaced: whether the model hands each new running state to the cache.
    """

    def __init__(
        self, cache: Cache, past: int, *, rewritten: bool = False, replaced: bool = False
    ) -> None:
        self._cache = cache
        self._layers = [(layer, *_held(layer, past, rewritten, replaced)) for layer in cache.layers]
        for number, layer in enumerate(cache.layers if replaced else ()):
            if type(layer) is LinearAttentionLayer:
                cache.layers[number] = ReplacedStateLayer.of(layer)

    @classmethod
    def of(
        cls, cache: Cache | None, past: int, *, copies: bool = True, **options: bool
    ) -> Rollback | None:
        """What a cache holds; `None` without one, or where a layer is of a kind that is never
        pruned.

        Args:
            cache: as above.
            past: as above.
            copies: whether running states may be copied; if not, `None` where there are any.
            **options: as above.
        """
        kinds = set() if cache is None else {type(layer) for layer in cache.layers}
        if cache is None or not all(map(is_known, kinds)):
            return None
        if not copies and any(issubclass(kind, LinearAttentionLayer) for kind in kinds):
            return None
        return cls(cache, past, **options)

    def restore(self) -> None:
        """Bring the cache back to it."""
        self._cache.layers[:] = [layer for layer, _, _ in self._layers]
        for layer, attributes, slots in self._layers:
            grown = {name: vars(layer).get(name) for name in ("keys", "values")}
            vars(layer).clear()
            vars(layer).update(attributes)
            if slots is None:
                continue
            if isinstance(layer, StaticLayer):  # what is written after the length is never seen
                layer.cumulative_length.fill_(slots)
                continue
            for name, states in grown.items():
                assert isinstance(states, Tensor)  # as it was before the forward
                vars(layer)[name] = states[:, :, :slots]


def _held(layer: Any, past: int, rewritten: bool, replaced: bool) -> tuple[Attributes, int | None]:
    """Attributes of a cache layer, and its slots where what is appended to them can be cut off:
    keys and values are left out then, unless they are written in place.
    """
    attributes = dict(vars(layer))
    if type(layer) in WITHOUT_SLOTS:
        return {
            name: _table(value, copied=not (replaced and name == STATES))
            for name, value in attributes.items()
        }, None
    if isinstance(layer, StaticLayer):
        slots = attributes.get("slots")
        return attributes, past if slots is None else slots.count
    if rewritten or layer.is_sliding or attributes["keys"] is None:
        return attributes, None
    del attributes["values"]
    return attributes, attributes.pop("keys").shape[2]


def _table(value: Any, *, copied: bool) -> Any:
    """An attribute of a layer with a running state: tables, with copies of their tensors or not."""
    if not isinstance(value, dict):
        return value
    return {k: v.clone() if copied and isinstance(v, Tensor) else v for k, v in value.items()}


def reset_rope(base: nn.Module, before: Tensor | None) -> None:
    """After a call that has raised: where the cache goes on, on M-RoPE models."""
    if hasattr(base, ROPE):
        setattr(base, ROPE, before)
