"""PolicyHooks: what happens around a model whose prompt is read by an expert.

A policy puts image features in the embeddings of a prompt itself and hands its base model these
alone, so what they were made from goes with them. The base model fills a cache, from which tokens
may be missing. The expert reads that cache and is no part of the text model: it is told which slots
there are, as decoding steps of the text model are.
Shapes: `B` batch, `T` logical length of the prompt, `C` cameras of a row, padding included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine import features
from foveate.engine.cache_argument import cache_of
from foveate.engine.cached_forward import CachedForward
from foveate.engine.caches import slots_before
from foveate.engine.compilation import untraced
from foveate.engine.inputs import bound, cached
from foveate.engine.plan import Plan
from foveate.engine.replaced_forward import forward_of
from foveate.engine.rollback import Rollback
from foveate.engine.state import Kwargs
from foveate.engine.thread_state import ThreadState
from foveate.errors import InputError
from foveate.families import Family

PREFIX = "_foveate_prefix"  # attribute of a prompt's embeddings


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the embeddings of a prompt were made from.

    Args:
        plan: that of the session that made them.
        ids: (B, T) token ids.
        made: modality -> its features, a tagged ModelOutput.
        placed: images of the encoder that are in the prompt, in order of appearance.
    """

    plan: Plan
    ids: Tensor
    made: Mapping[str, Any]
    placed: tuple[int, ...]

    def embeddings(self, embeds: Tensor, visual: Mapping[str, Tensor]) -> Tensor:
        """(B, T, D) embeddings with features as they are by now, in place of those before.

        Args:
            embeds: the embeddings before.
            visual: modality -> (B, T) placeholders.
        """
        for modality, mask in visual.items():
            rows = torch.cat(list(features.tokens_of(self.made[modality], self.placed)))
            where = mask[..., None].to(embeds.device)
            embeds = embeds.masked_scatter(where, rows.to(embeds.device, embeds.dtype))
        return embeds


def prefix_of(embeds: Tensor | None, plan: Plan) -> Prefix | None:
    """What embeddings were made from, if that was in a session with this plan."""
    prefix = getattr(embeds, PREFIX, None)
    return prefix if prefix is not None and prefix.plan is plan else None


class PolicyHooks:
    """Hooks around a policy, where it embeds a prompt, and around its expert.

    Args:
        plan: what to do where.
        family: the model.
        state: what each thread is doing with the model.
        look_after: puts back hooks that others have taken off.
    """

    def __init__(
        self, plan: Plan, family: Family, state: ThreadState, look_after: Callable[[], None]
    ) -> None:
        self.plan, self.family, self.state = plan, family, state
        self._look_after = look_after

    # -- around the policy

    @untraced
    def forward(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the policy's forward, within which threads are inside the model."""
        return self.sample(forward_of(module, before), *args, **kwargs)

    @untraced
    def sample(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the method that samples actions, likewise."""
        self._look_after()
        return original(*args, **kwargs)

    @untraced
    def embed(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Around the method that puts image features in the embeddings of a prompt."""
        arguments = bound(original, args, kwargs)
        ids, cameras = arguments["input_ids"], arguments["pixel_attention_mask"]
        visual = ids == self.family.placeholder_ids["image"]
        self.state.made = made = dict[str, Any]()
        try:
            embeds: Tensor = original(*args, **kwargs)
        finally:
            self.state.made = None
        # One look at the device tells the host both.
        seen = torch.cat((visual.sum(1, keepdim=True), cameras.to(ids.device)), 1).tolist()
        has, there = [row[0] for row in seen], [row[1:] for row in seen]
        if any(has):  # else images have no place
            check_cameras(has, there, made["image"].encoded.lengths)
        flat = (camera for row in there for camera in row)
        placed = tuple(number for number, camera in enumerate(flat) if camera)
        setattr(embeds, PREFIX, Prefix(self.plan, ids, made, placed))
        return embeds

    # -- around the expert

    @untraced
    def expert(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the expert's forward: tell it which slots the cache holds."""
        state, rollback = self.state, self._enter(bound(module.forward, args, kwargs))
        try:
            output = forward_of(module, before)(*args, **kwargs)
            return output if state.expert is None else state.expert.leave(output)
        except BaseException:
            if rollback is not None:
                rollback.restore()
            raise
        finally:
            state.expert = None

    @torch.compiler.disable
    def _enter(self, arguments: Kwargs) -> Rollback | None:
        """Before the expert: what the cache is brought back to if it dies."""
        cache: Any = cache_of(arguments)
        expert = self.family.expert
        past = cached(cache)
        if not past:
            return None
        assert expert is not None  # or nothing is around it
        before, sequence = slots_before(cache, past, self.plan.work), arguments["inputs_embeds"]
        self.state.expert = CachedForward.after(self.plan, expert, cache, before, sequence)
        return None if self.state.expert is None else Rollback.of(cache, past)

    @untraced
    def layer(
        self,
        number: int,
        module: nn.Module,
        before: Callable[..., Any] | None,
        hidden: Tensor,
        **kwargs: Any,
    ) -> Any:
        """In place of the forward of a layer of it; arguments as in `ForwardHooks.layer`."""
        if self.state.expert is not None:
            _, hidden, kwargs = self.state.expert.enter(number, module, hidden, kwargs)
        return forward_of(module, before)(hidden, **kwargs)


def check_cameras(has: list[int], there: list[list[int]], lengths: Sequence[int]) -> None:
    """Refuse a prompt whose placeholders are not those of its cameras.

    Args:
        has: placeholders of each row.
        there: whether each row has each of its C cameras.
        lengths: visual tokens of each of all B C.

    Raises:
        InputError: a row has more of them, or fewer.
    """
    tokens = iter(lengths)
    for row, (found, cameras) in enumerate(zip(has, there, strict=True)):
        wanted = sum(next(tokens) * bool(camera) for camera in cameras)
        if found != wanted:
            raise InputError(
                f"row {row} has {found} image placeholders, but its cameras in "
                f"pixel_attention_mask have {wanted} visual tokens; give each camera its "
                "placeholders, in order"
            )
