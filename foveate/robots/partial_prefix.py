"""PartialPrefix: a prompt through decoder layers that keep old keys and values of some tokens.

Shapes: `B` rows of the batch, `T` tokens of the prompt, `P` of them that a layer computes, `Hkv`
key-value heads of width `d`, `D` hidden, `V` patches of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from foveate.engine.cache_argument import cache_of
from foveate.engine.layout import each_part, take
from foveate.engine.masks import left_align
from foveate.engine.policy import check_cameras
from foveate.families import Family
from foveate.families.decoder_layer import mixer_of
from foveate.robots.attended import Attended
from foveate.robots.control_step import ControlStep, Observation
from foveate.robots.vla_cache import VLACache


class RefreshedLayer(DynamicLayer):
    """A cache layer that begins with the keys and values of another, of which the next update
    writes some anew; after that it grows as any.

    Args:
        before: a layer of T tokens.
        rows: (B, P) tokens that the next update is of.
    """

    _layer_type = None  # keeps the class out of transformers' table of layer types

    def __init__(self, before: Any, rows: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(before.keys, before.values)
        self.keys, self.values = before.keys, before.values
        self._rows: Tensor | None = rows

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (B, Hkv, P, d) keys and values to their tokens: all (B, Hkv, T, d) of them."""
        if self._rows is None:
            return super().update(key_states, value_states, *args, **kwargs)
        rows, self._rows = self._rows.to(key_states.device)[:, None, :, None], None
        assert self.keys is not None  # but those of before
        assert self.values is not None
        self.keys = self.keys.scatter(2, rows.expand_as(key_states), key_states)
        self.values = self.values.scatter(2, rows.expand_as(value_states), value_states)
        return self.keys, self.values


class PartialPrefix:
    """One pass of a prompt whose tokens all see each other.

    Args:
        taken: layer -> (B, T) tokens that it and later ones take over; each of them a superset of
            the one before.
        before: the cache of the step before; without it nothing is taken over.
        attended: where to note what is attended to.
    """

    def __init__(
        self, taken: Mapping[int, Tensor], before: Cache | None, attended: Attended
    ) -> None:
        self._taken = {number: gone for number, gone in taken.items() if gone.any()}
        self._before, self.attended = before, attended
        self._rows: Tensor | None = None  # (B, P) computed, short rows repeated; `None` for all
        self._mask: Tensor | None = None  # of these rows

    def run(
        self, number: int, run: Callable[..., Tensor], layer: Any, hidden: Tensor, kwargs: Any
    ) -> Tensor:
        """Run a layer for the tokens that it computes; others stay as they are.

        Args:
            number: the decoder layer.
            run: its forward.
            layer: its module.
            hidden: (B, T, D) its input.
            kwargs: its keyword arguments, for all tokens.

        Returns:
            (B, T, D).
        """
        if number in self._taken:
            self._leave(self._taken[number], kwargs["attention_mask"])
        cache = cache_of(kwargs)
        if self._rows is None:
            output = run(hidden, **kwargs)
        else:
            assert self._before is not None  # as something is taken over
            rows = self._rows.to(hidden.device)
            cache.layers[number] = RefreshedLayer(self._before.layers[number], rows)
            rotary = each_part(kwargs["position_embeddings"], lambda part: take(part, rows))
            positions = take(kwargs["position_ids"], rows)
            told = {"attention_mask": self._mask, "position_ids": positions}
            kwargs = {**kwargs, **told, "position_embeddings": rotary}
            made = run(take(hidden, rows), **kwargs)
            output = hidden.scatter(1, rows[..., None].expand_as(made), made)
        keys, rotary = cache.layers[number].keys, kwargs["position_embeddings"]
        self.attended.note(number, mixer_of(layer), keys, rotary)
        return output

    def _leave(self, gone: Tensor, mask: Tensor) -> None:
        """Compute (B, T) tokens no more.

        Args:
            gone: the tokens.
            mask: (B or 1, 1, T, T) of all.
        """
        self._rows, fresh = left_align(~gone)
        self.attended.only(self._rows, fresh)
        index = self._rows.to(mask.device)[:, None, :, None].expand(-1, 1, -1, mask.shape[-1])
        self._mask = mask.expand(len(gone), -1, -1, -1).gather(2, index)


def begin(
    rule: VLACache, family: Family, seeing: Observation, known: ControlStep | None
) -> PartialPrefix:
    """A pass of a prompt by a rule.

    Args:
        rule: the rule.
        family: the policy.
        seeing: what the prompt is made from.
        known: the step before, if there was one.

    Raises:
        InputError: a row's placeholders are not those of its cameras.
    """
    cut = None if family.encoder is None else family.encoder.cuts
    assert cut is not None  # as images are cut into equal patches
    visual = torch.eq(seeing.ids, family.placeholder_ids["image"])
    count = (seeing.pixels.shape[-2] // cut[0]) * (seeing.pixels.shape[-1] // cut[1])
    lengths = [count] * seeing.cameras.numel()
    check_cameras(visual.sum(1).tolist(), seeing.cameras.tolist(), lengths)
    real = torch.ones_like(visual) if seeing.mask is None else seeing.mask.bool()
    words, taken = real & ~visual, dict[int, Tensor]()
    same = None if known is None else known.seen.same_rows(seeing)
    if known is not None and same is not None and visual.any():
        assert known.attended is not None  # it followed the rule too
        assert known.entropy is not None
        there = seeing.cameras.bool()
        likeness = alike(known.seen.pixels[there], seeing.pixels[there], cut).to(visual.device)
        row = there.nonzero()[:, 0].to(visual.device)
        attended, entropy = known.attended.to(visual.device), known.entropy.to(visual.device)
        sound = entropy.isfinite().all(1)  # NaN would stay with those that do not change
        likeness = likeness.masked_fill(~(same & words.any(1) & sound)[row, None], -1.0)
        chosen = rule.candidates(likeness, attended[visual].view(-1, count))
        candidates = torch.zeros_like(visual).masked_scatter(visual, chosen)
        taken = rule.taken_over(candidates, attended, entropy)
    notes = Attended(real, words, rule.reader(family.text_layers))
    return PartialPrefix(taken, None if known is None else known.cache, notes)


def alike(before: Tensor, now: Tensor, cut: tuple[int, int]) -> Tensor:
    """(N, V) cosine of the pixels of each patch in two steps; 1 where they are equal.

    Args:
        before: (N, 3, H, W) images from -1 to 1, as pi0's processor makes them; compared from 0.
        now: (N, 3, H, W) the same cameras, a step later.
        cut: height and width of a patch.
    """
    one, two = (F.unfold((x.float() + 1) / 2, cut, stride=cut) for x in (before, now))
    cosine = F.cosine_similarity(one, two, dim=1, eps=1e-8)
    return cosine.masked_fill((one == two).all(1), 1.0)
