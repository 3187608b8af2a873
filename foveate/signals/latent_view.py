"""What a decoder layer with latent attention (MLA) is about to attend with.

Such a layer caches two things of a token: a latent of width `r`, of which all heads make their keys
and values, and one rotated key of width `d_rope` that all heads share. The key of a head is its own
part of width `d_nope`, which has no position, beside the shared one: `d = d_nope + d_rope`. Values
have width `d_v`, every head has keys of its own, and other shapes are as in `layer_view`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.errors import UnsupportedModelError
from foveate.families.decoder_layer import mixer_of
from foveate.signals.fused_view import FusedView, is_fused
from foveate.signals.layer_view import LayerView, rotary_function


def view_of(
    layer: Any,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor] | Tensor | None,
    past: tuple[Tensor, Tensor] | None = None,
    positions: Tensor | None = None,
) -> LayerView:
    """The view that suits the attention of a layer; arguments as in `LayerView`."""
    # The method says that latents are cached: releases without it cache whole keys and values.
    mixer, kind = mixer_of(layer), LayerView
    if hasattr(mixer, "expand_kv"):
        kind = LatentView
    elif is_fused(mixer):
        kind = FusedView
    return kind(layer, hidden, rotary, past, positions)


class LatentView(LayerView):
    """A decoder layer with latent attention about to run.

    Its cache holds latents (B, 1, S, r) as keys, and shared keys (B, 1, S, d_rope) as values.
    """

    @cached_property
    @torch.no_grad()
    def past_keys(self) -> Tensor | None:
        """(B, H, S, d) keys of what is cached; `None` without a cache."""
        if self.past is None:
            return None
        latents, shared = (part.to(self.hidden.dtype) for part in self.past)
        return _beside(self._made_of(latents)[0], shared)

    @property
    def rotation(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """What rotates the shared parts, in interleaved pairs or in halves.

        Raises:
            UnsupportedModelError: the config does not say which.
        """
        module = self.attention_module
        if hasattr(module, "k_rope_only_layernorm"):  # Dots 3 Note, which knows one way
            return sys.modules[type(module).__module__].apply_rotary_pos_emb_interleave
        if not hasattr(module.config, "rope_interleave"):
            raise UnsupportedModelError(
                f"the config of {type(module).__name__} has no rope_interleave, so that it is "
                "unknown how its latent attention rotates; use a pre_llm method"
            )
        if not module.config.rope_interleave:
            return rotary_function(module)
        return sys.modules[type(module).__module__].apply_rotary_pos_emb_interleave

    @property
    def rotary_width(self) -> int:
        """d_rope."""
        return self.attention_module.qk_rope_head_dim

    @cached_property
    @torch.no_grad()
    def keys(self) -> Tensor:
        """(B, H, P, d) keys, of which the shared part is rotated."""
        shared = self._latents[1]
        if self._rotary is not None:
            parts = (part.expand(len(shared), -1, -1) for part in self._rotary)
            shared = self.rotation(shared, shared, *parts)[1]
        return _beside(self._parts[0], shared)

    @property
    def values(self) -> Tensor:
        """(B, H, P, d_v) values."""
        return self._parts[1]

    @torch.no_grad()
    def queries(self, columns: Tensor, rotate: bool = True) -> Tensor:
        """(B, H, Q, d) queries of (B, Q) columns."""
        columns = columns.to(self.hidden.device)
        rows = torch.arange(columns.shape[0], device=columns.device)[:, None]
        own, shared = self._queries_of(self._normed[rows, columns])
        if self._rotary is not None and rotate:
            parts = (part.expand(len(own), -1, -1)[rows, columns] for part in self._rotary)
            shared = self.rotation(shared, shared, *parts)[0]
        return torch.cat((own, shared), -1)

    @torch.no_grad()
    def closeness(self, columns: Tensor) -> Tensor:
        """As in `LayerView`: over the width d, of which d_rope is rotated."""
        own, rotated = self.attention_module.qk_nope_head_dim, self.rotary_width
        return (own + rotated * super().closeness(columns)) / (own + rotated)

    @cached_property
    @torch.no_grad()
    def _plain_keys(self) -> Tensor:
        return _beside(self._parts[0], self._latents[1])

    def _queries_of(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, Q, d_nope) and (B, H, Q, d_rope) parts of queries of (B, Q, D) normed states."""
        module = self.attention_module
        if module.q_lora_rank is None:
            made = self._projection("q_proj")(normed)
        else:
            compressed = module.q_a_layernorm(self._projection("q_a_proj")(normed))
            compressed = compressed * getattr(module, "q_lora_scale", 1.0)
            made = self._projection("q_b_proj")(compressed)
        return _heads(made, module.qk_nope_head_dim, module.qk_rope_head_dim)

    @cached_property
    @torch.no_grad()
    def _latents(self) -> tuple[Tensor, Tensor]:
        """(B, 1, P, r) latents, and (B, 1, P, d_rope) shared keys before they are rotated."""
        module = self.attention_module
        made = self._projection("kv_a_proj_with_mqa")(self._normed)[:, None]
        latents, shared = made.split([module.kv_lora_rank, module.qk_rope_head_dim], -1)
        latents = module.kv_a_layernorm(latents) * getattr(module, "kv_lora_scale", 1.0)
        norm = getattr(module, "k_rope_only_layernorm", None)
        return latents, shared if norm is None else norm(shared)

    @cached_property
    @torch.no_grad()
    def _parts(self) -> tuple[Tensor, Tensor]:
        return self._made_of(self._latents[0])

    def _made_of(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, S, d_nope) own parts of keys, and (B, H, S, d_v) values, of latents."""
        module = self.attention_module
        made = self._projection("kv_b_proj")(latents[:, 0])
        return _heads(made, module.qk_nope_head_dim, module.v_head_dim)


def _heads(made: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """(B, H, N, first) and (B, H, N, second) of (B, N, H (first + second))."""
    heads = made.unflatten(-1, (-1, first + second)).transpose(1, 2)
    return heads[..., :first], heads[..., first:]


def _beside(own: Tensor, shared: Tensor) -> Tensor:
    """(B, H, N, d) keys of own parts (B, H, N, d_nope) and a part (B, 1, N, d_rope) for all."""
    return torch.cat((own, shared.expand(-1, own.shape[1], -1, -1)), -1)
