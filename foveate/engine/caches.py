"""Caches as wholes: which of their layers can be pruned, and what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from foveate.core import PartialCompute
from foveate.engine.cache import (
    REFERENCE,
    WORK,
    PrunedDynamicLayer,
    PrunedIndexed,
    PrunedLayer,
    PrunedReferenceLayer,
    PrunedSlidingLayer,
    PrunedStaticLayer,
)
from foveate.engine.running_state import ReplacedStateLayer
from foveate.engine.slots import Slots
from foveate.errors import CacheError

PRUNED: dict[type, type[PrunedLayer]] = {
    DynamicLayer: PrunedDynamicLayer,
    DynamicSlidingWindowLayer: PrunedSlidingLayer,
    StaticLayer: PrunedStaticLayer,
}
_INDEXED = getattr(cache_utils, "DynamicIndexedLayer", None)  # not in transformers 5.20
if _INDEXED is not None:
    PRUNED[_INDEXED] = type("PrunedIndexedLayer", (PrunedIndexed, _INDEXED), {})
WITHOUT_SLOTS = frozenset(
    {LinearAttentionLayer, ReplacedStateLayer, getattr(cache_utils, "DummyLayer", None)} - {None}
)  # transformers 5.20 has no DummyLayer
"""Cache layers that are left as they are: of a running state, or of layers that keep nothing."""


def is_reference(layer: Any) -> bool:
    """Whether a cache layer is one of transformers' that keep the first prompt and a window."""
    return layer is not None and _pruned_kind(type(layer)) is PrunedReferenceLayer


def _pruned_kind(kind: type) -> type[PrunedLayer] | None:
    """What layers of a kind become when they are pruned; `None` if they cannot be, or are."""
    if getattr(kind, "_layer_type", None) == REFERENCE and issubclass(kind, DynamicLayer):
        return PrunedReferenceLayer
    return PRUNED.get(kind)


def is_known(kind: type) -> bool:
    """Whether layers of a kind can be pruned, are pruned, or have no slots."""
    pruned = issubclass(kind, PrunedLayer) or _pruned_kind(kind) is not None
    return pruned or kind in WITHOUT_SLOTS


def check_cache(cache: Cache | None, past: int) -> None:
    """Refuse caches whose layers cannot be pruned, for a forward with images.

    Args:
        cache: the cache.
        past: its logical length.

    Raises:
        CacheError: the cache is offloaded, or holds quantized, sliding-window or other special
            layers; or its layers see a window alone of what follows the first prompt.
    """
    if cache is None:
        return
    if getattr(cache, "offloading", False):
        raise CacheError(
            "an offloaded KV cache cannot be pruned; use cache_implementation='dynamic' or 'static'"
        )
    layers = {type(layer) for layer in cache.layers}
    if cache.layer_class_to_replicate is not None:
        layers.add(cache.layer_class_to_replicate)
    for kind in layers:
        if not is_known(kind):
            raise CacheError(
                f"a KV cache with {kind.__name__} layers cannot be pruned; use "
                "cache_implementation='dynamic', or 'static' where no layer of the model has a "
                "window or an indexer"
            )
    prompts = [getattr(layer, "prefill_length", None) for layer in cache.layers]
    if any(length is not None and length <= past for length in prompts) and past:
        raise CacheError(
            "layers of this KV cache see the first prompt and a window of what follows it, so that "
            "new images would soon be out of sight; start with a new cache, and give all images in "
            "its first prompt"
        )


def slots_before(
    cache: Cache | None, past: int, work: Mapping[int, PartialCompute]
) -> list[Slots | None]:
    """What each layer of a cache holds before a forward, if it is pruned.

    Args:
        cache: the cache.
        past: its logical length, as its first layer tells it.
        work: decoder layer -> what the session computes of visual tokens there.

    Raises:
        CacheError: a forward or a crop has broken off half way through the cache, or another
            session computed less of its visual tokens than this one would read.
    """
    found: list[Slots | None] = []
    for number, layer in enumerate(cache.layers if cache is not None else ()):
        slots = getattr(layer, "slots", None)
        found.append(slots)
        if slots is None:
            continue
        if slots.length != past:
            raise CacheError(
                f"the layers of this KV cache disagree on its length ({past} and {slots.length}): "
                "a forward outside a foveate session, or a crop, broke off half way; start with a "
                "new cache"
            )
        if slots.visual is not None and getattr(layer, "attached", {}).get(WORK) != work.get(
            number
        ):
            raise CacheError(
                "this KV cache holds visual tokens of which another foveate session computed only "
                "a part; continue in a session with the same method, or start with a new cache"
            )
    return found


def pruned_layer(cache: Cache, index: int, fresh: Slots, removed: int) -> PrunedLayer:
    """The cache layer at `index`, made a pruned one if it is not yet.

    Args:
        cache: the cache; layers up to `index` that it would add lazily are added.
        index: decoder layer.
        fresh: slots of a layer from which nothing was removed so far; layers that share it stay in
            step.
        removed: logical positions of this forward without a column; a static layer that is still
            empty allocates that many slots less.
    """
    while len(cache.layers) <= index:
        assert cache.layer_class_to_replicate is not None
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, PrunedLayer):
        if layer.slots is None:  # it was reset
            layer.slots = fresh
            _save_room(layer, removed)
        return layer
    kind = _pruned_kind(type(layer))
    assert kind is not None  # as `check_cache` has seen
    if kind is PrunedReferenceLayer:
        pruned: PrunedLayer = PrunedReferenceLayer.of(layer)
    else:
        pruned = kind.__new__(kind)
        pruned.__dict__.update(layer.__dict__)
    pruned.slots, pruned.incoming = fresh, None
    if isinstance(pruned, PrunedSlidingLayer):
        pruned.slots = fresh.last(pruned.sliding_window - 1)
    if isinstance(pruned, PrunedStaticLayer):
        pruned.logical_max = pruned.max_cache_len
    _save_room(pruned, removed)
    cache.layers[index] = pruned
    return pruned


def _save_room(layer: PrunedLayer, removed: int) -> None:
    """Allocate fewer slots of a static layer that has allocated none yet."""
    if isinstance(layer, PrunedStaticLayer) and not layer.is_initialized:
        layer.max_cache_len = layer.logical_max - removed


def is_pruned(cache: Cache | None) -> bool:
    """Whether any layer of a cache is a pruned one."""
    return cache is not None and any(isinstance(layer, PrunedLayer) for layer in cache.layers)


def slots_held(layers: Iterable[Any]) -> list[int]:
    """Physical slots of each layer of a cache, pruned or not; 0 where it has none."""
    counts = []
    for layer in layers:
        if type(layer) in WITHOUT_SLOTS:
            counts.append(0)
            continue
        if isinstance(layer, PrunedLayer) and layer.slots is not None:
            counts.append(layer.slots.count)
            continue
        window, held = getattr(layer, "sliding_window", None), int(layer.get_seq_length())
        if is_reference(layer):
            prompt = layer.prefill_cumulative_length
            counts.append(prompt + min(held - prompt, layer.sliding_window - 1))
            continue
        counts.append(held if window is None else min(held, window - 1))
    return counts
