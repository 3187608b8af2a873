"""Cache layers that hold fewer slots than the sequence has tokens, and report the logical length.

Everything outside the text model (mask builders, `generate`) goes on reasoning in logical lengths;
`Slots` says which logical position each slot holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from foveate.engine.compilation import untraced
from foveate.engine.slots import Slots
from foveate.errors import CacheError

REFERENCE = "reference_sliding_attention"
"""Kind of layers, in transformers' words, that see the first prompt and a window after it."""
WORK = "work"  # attached where a session computes less of visual tokens: what it computes


class PrunedLayer(CacheLayerMixin):
    """Mixin over a cache layer class. `incoming` is set by the session before each update."""

    _layer_type = None  # keeps the subclass out of transformers' table of layer types
    slots: Slots | None
    incoming: Slots | None
    attached: Mapping[str, Any] = MappingProxyType({})  # by extensions; never changed in place

    @untraced
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of the physical columns.

        Raises:
            CacheError: no session announced the columns, so this cache is used outside of any.
        """
        if self.incoming is None:
            raise CacheError(
                "this KV cache holds pruned layers, which only the session that pruned them, or "
                "another of the same model, can extend; continue in a foveate.use block, or start "
                "with a new cache"
            )
        states = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[safe-super]
        self.slots, self.incoming = self.incoming, None
        return states

    def attach(self, name: str, value: Any) -> None:
        """Keep something of an extension as long as the layer holds its tokens; a value with
        `rows(pick)` follows the rows of the batch.
        """
        self.attached = {**self.attached, name: value}

    def get_seq_length(self) -> int:
        """Logical length: tokens seen, removed ones included."""
        return 0 if self.slots is None else self.slots.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical (length, offset) of the mask to build."""
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Reorder rows for beam search."""
        super().reorder_cache(beam_idx)
        self._rows(beam_idx, lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._rows(("repeat", repeats), lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._rows(indices, lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Args:
            tokens_to_remove: zero or a negative number of logical tokens, as in transformers.

        Raises:
            CacheError: the crop reaches into a region from which tokens were removed.
        """
        count = abs(tokens_to_remove)
        if self.slots is not None and count > self.slots.tail and count > self.slots.whole:
            raise CacheError(
                f"cannot crop {count} tokens off this cache: of those, it holds only the last "
                f"{self.slots.whole} in every row, as visual tokens, padding or hidden text before "
                "them were removed; crop less, or start with a new cache"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if self.slots is not None and count:
            self.slots = self.slots.crop(count)

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.slots, self.attached = None, {}

    def evict(self, left: Slots, source: Tensor) -> None:
        """Keep some slots only.

        Args:
            left: the slots left.
            source: (B, S') slot of now that each comes from.
        """
        assert self.keys is not None
        assert self.values is not None  # there is something to forget
        self.keys, self.values = _slots(self.keys, source), _slots(self.values, source)
        self.slots = left

    def _rows(self, key: object, pick: Any) -> None:
        if self.slots is not None:
            self.slots = self.slots.rows(key, pick)
        for name, value in self.attached.items():
            if hasattr(value, "rows"):
                self.attach(name, value.rows(pick))


class PrunedDynamicLayer(PrunedLayer, DynamicLayer):
    """A growing cache layer with fewer slots than tokens."""


class PrunedSlidingLayer(PrunedLayer, DynamicSlidingWindowLayer):
    """A sliding-window layer with fewer slots than tokens.

    It holds the last physical slots of a window, which reach at least as far back as the window of
    positions; masks by position do the rest.
    """

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The window of logical positions, as the unpruned layer reports it."""
        return DynamicSlidingWindowLayer.get_mask_sizes(self, query_length)

    @untraced
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns, and keep a window; `cumulative_length` counts logical positions."""
        states = super().update(key_states, value_states, *args, **kwargs)
        assert self.slots is not None
        self.slots = self.slots.last(self.sliding_window - 1)
        self.cumulative_length = self.slots.length
        return states

    def crop(self, tokens_to_remove: int) -> None:
        """Not supported: the window has forgotten what would come back. Without tokens to remove,
        a layer that records its past (assisted decoding wants it) goes back to its window.

        Raises:
            CacheError: always, unless nothing is removed.
        """
        if tokens_to_remove:
            raise CacheError(
                "a pruned sliding-window cache cannot be cropped (assisted decoding does that); "
                "use greedy search, sampling or beam search"
            )
        if self.slots is not None and self.is_initialized:
            assert self.keys is not None
            assert self.values is not None  # as it is initialised
            first = self.keys.shape[2] - self.slots.count
            self.keys, self.values = self.keys[:, :, first:], self.values[:, :, first:]


class PrunedReferenceLayer(PrunedLayer, DynamicLayer):
    """A layer that keeps all of the first prompt and a window after it (Unlimited-OCR), with fewer
    slots than tokens; the prompt's slots and the window's are in one tensor.

    It reports all logical positions, so that masks are built for them: those of transformers 5.23
    count the window's offset off the prompt's padding too, and show padding once the window moves.

    Args:
        prefill_length: logical length of the first prompt, as the model's masks ask for it; `None`
            until it is known.
    """

    is_sliding = True
    prefill_length: int | None
    window: int
    prompt: int  # slots of the first prompt

    @classmethod
    def of(cls, layer: Any) -> PrunedReferenceLayer:
        """A layer with what one of transformers' holds, whose window has not moved yet."""
        made = cls.__new__(cls)
        held = dict(vars(layer))
        made.window, made.prompt = held.pop("sliding_window"), held.pop("prefill_cumulative_length")
        prompt = {part: held.pop(f"prefill_{part}") for part in ("keys", "values")}
        held.pop("cumulative_length")
        vars(made).update(held, _layer_type=REFERENCE)
        if made.is_initialized:
            made.keys = torch.cat((prompt["keys"], held["keys"]), dim=2)
            made.values = torch.cat((prompt["values"], held["values"]), dim=2)
        return made

    @untraced
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns; then forget what is neither of the prompt nor in the window."""
        before = 0 if self.slots is None else self.slots.length
        states = super().update(key_states, value_states, *args, **kwargs)
        slots = self.slots
        assert slots is not None
        if self.prefill_length is None:
            self.prefill_length = slots.length
        if before < self.prefill_length:
            self.prompt = slots.count - max(slots.length - self.prefill_length, 0)
        gone = slots.count - self.prompt - (self.window - 1)
        if gone > 0:
            self.slots, start = slots.skip(self.prompt, gone), self.prompt + gone
            self.keys, self.values = (
                torch.cat((x[:, :, : self.prompt], x[:, :, start:]), dim=2) for x in states
            )
        return states

    def set_prefill_length(self, prefill_length: int) -> None:
        """What `generate` declares before a prompt that may come in chunks."""
        if self.prefill_length is None:
            self.prefill_length = prefill_length

    def evict(self, left: Slots, source: Tensor) -> None:
        """Keep some slots only; those that go are of the prompt."""
        assert self.slots is not None
        self.prompt -= self.slots.count - left.count
        super().evict(left, source)

    def crop(self, tokens_to_remove: int) -> None:
        """Not supported, as in a window.

        Raises:
            CacheError: always, unless nothing is removed.
        """
        if tokens_to_remove:
            raise CacheError(
                "a pruned cache of a prompt and a window cannot be cropped (assisted decoding does "
                "that); use greedy search, sampling or beam search"
            )

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.prefill_length, self.prompt = None, 0


class PrunedStaticLayer(PrunedLayer, StaticLayer):
    """A preallocated cache layer with fewer slots than tokens; `logical_max` is what it reports."""

    logical_max: int

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Static masks span the whole logical buffer."""
        return self.logical_max, 0

    def get_max_length(self) -> int:
        """Logical capacity."""
        return self.logical_max

    def reset(self) -> None:
        """Empty the layer. What comes next may lose fewer tokens, so it allocates anew."""
        super().reset()
        if self.max_cache_len < self.logical_max:
            self.max_cache_len = self.logical_max
            self.keys = self.values = None
            self.is_initialized = False

    def evict(self, left: Slots, source: Tensor) -> None:
        """Keep some slots only, in smaller buffers."""
        assert self.slots is not None
        removed = self.slots.count - source.shape[1]
        super().evict(left, source)
        self.max_cache_len -= removed
        assert self.keys is not None
        assert self.values is not None  # as before
        room = (0, 0, 0, self.max_cache_len - source.shape[1])
        self.keys, self.values = F.pad(self.keys, room), F.pad(self.values, room)
        self.cumulative_length -= removed


def _slots(x: Tensor, source: Tensor) -> Tensor:
    """(B, H, S', d) of (B, H, S, d) at (B, S') slots."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.transpose(1, 2)[rows, source.to(x.device)].transpose(1, 2).contiguous()


class PrunedIndexed(PrunedLayer):
    """Mixin over a cache layer with a key of every slot for an indexer, which chooses slots."""

    indexer_keys: Tensor | None

    def evict(self, left: Slots, source: Tensor) -> None:
        """Keep some slots only, with their keys for the indexer."""
        super().evict(left, source)
        if self.indexer_keys is not None:
            self.indexer_keys = _slots(self.indexer_keys[:, None], source)[:, 0]
