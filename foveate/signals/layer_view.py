"""What a decoder layer is about to attend with, worked out before it runs and without an attention
map.

The layer's own norm, projections, rotary embedding and scaling are used, so the rows equal those of
eager attention. Each part is computed once, and only if a signal asks for it.
Shapes: `B` rows, `P` columns, `Q` queries of a row, `H` heads and `Hkv` key heads of width `d`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.errors import UnsupportedModelError
from foveate.families.decoder_layer import (
    head_norm_of,
    late_head_norm_of,
    mixer_of,
    norm_of,
    position_scale_of,
)


class LayerView:
    """A decoder layer about to run.

    Args:
        layer: the layer; of one without attention, `hidden` is all that can be read.
        hidden: (B, P, D) its input.
        rotary: cos and sin, (B or 1, P, d) each, or one complex tensor (B or 1, P, d / 2) that
            turns pairs of neighbours; `None` for a layer without rotary positions.
        past: cached keys (B, Hkv, S, d), already rotated, and values, as the cache holds them.
        positions: (B or 1, P) position ids, by which some scale their queries.

    What is read raises `UnsupportedModelError` where the layer's weights are offloaded and nothing
    brings them back, or its projections are fused.
    """

    def __init__(
        self,
        layer: Any,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor] | Tensor | None,
        past: tuple[Tensor, Tensor] | None = None,
        positions: Tensor | None = None,
    ) -> None:
        self.layer, self.hidden, self.past = layer, hidden.detach(), past
        self.positions = positions
        self.attention_module = mixer_of(layer)
        self._turns = isinstance(rotary, Tensor)
        self._rotary = (rotary,) if isinstance(rotary, Tensor) else rotary

    @cached_property
    @torch.no_grad()
    def _normed(self) -> Tensor:
        return self.hidden if _norms_after(self.layer) else norm_of(self.layer)(self.hidden)

    @property
    def past_keys(self) -> Tensor | None:
        """(B, Hkv, S, d) cached keys, rotated; `None` without a cache."""
        return None if self.past is None else self.past[0]

    @property
    def rotation(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """What rotates queries and keys: of both, and of the parts of `rotary`."""
        return turned if self._turns else rotary_function(self.attention_module)

    @property
    def scaling(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.attention_module.scaling

    @property
    def rotary_width(self) -> int:
        """Width of what it rotates of a head."""
        return self.attention_module.head_dim

    @cached_property
    @torch.no_grad()
    def _plain_keys(self) -> Tensor:
        return self._heads(self._projection("k_proj")(self._normed), "k")

    @cached_property
    @torch.no_grad()
    def keys(self) -> Tensor:
        """(B, Hkv, P, d) rotated keys."""
        k = self._plain_keys
        if self._rotary is not None:
            parts = (part.expand(k.shape[0], -1, -1) for part in self._rotary)
            k = self.rotation(k[:, :1], k, *parts)[1]
        return self._normed_late(k, "k")

    @cached_property
    @torch.no_grad()
    def values(self) -> Tensor:
        """(B, Hkv, P, d) values."""
        # Where keys are values (Gemma 4), they are so before the norm.
        shared = getattr(self.attention_module, "use_alternative_attention", False)
        projection = self._projection("k_proj" if shared else "v_proj")
        return self._heads(projection(self._normed), "v")

    @torch.no_grad()
    def value_logits(self, columns: Tensor) -> Tensor:
        """(B, Hkv, Q, P) float32 products of the values of (B, Q) columns with all, scaled as those
        of queries and keys are by their width.
        """
        v = self.values
        rows = torch.arange(v.shape[0], device=v.device)[:, None]
        asking = v.transpose(1, 2)[rows, columns.to(v.device)].transpose(1, 2)
        return torch.matmul(asking, v.mT).float() / v.shape[-1] ** 0.5

    @torch.no_grad()
    def queries(self, columns: Tensor, rotate: bool = True) -> Tensor:
        """(B, H, Q, d) queries of (B, Q) columns."""
        columns = columns.to(self.hidden.device)
        rows = torch.arange(columns.shape[0], device=columns.device)[:, None]
        projected = self._projection("q_proj")(self._normed[rows, columns])
        q = self._heads(self._without_gate(projected), "q")
        if (factor := getattr(self.attention_module, "qk_scale_factor", None)) is not None:
            q = q * factor  # Muse scales queries once more after their norm
        if self._rotary is not None and rotate:
            parts = (part.expand(q.shape[0], -1, -1)[rows, columns] for part in self._rotary)
            q = self.rotation(q, q, *parts)[0]
        return self._scaled(self._normed_late(q, "q"), rows, columns)

    @torch.no_grad()
    def attention(
        self, columns: Tensor, visible: Tensor | None = None, cached: Tensor | None = None
    ) -> Tensor:
        """Softmax attention of some queries over the cached keys and the columns of this forward.

        Args:
            columns: (B, Q) columns of the queries.
            visible: (B, Q or 1, P) columns that they may see, or `None` for all.
            cached: (B, Q or 1, S) the same for the cached keys.

        Returns:
            (B, H, Q, P) float32 probabilities of the P columns; with cached keys they do not sum to
            one.
        """
        return self._attention(columns, visible, cached)[1]

    @torch.no_grad()
    def attention_to_past(self, columns: Tensor, cached: Tensor | None = None) -> Tensor:
        """The same for the cached keys, where all columns may be seen: (B, H, Q, S)."""
        return self._attention(columns, None, cached)[0]

    def _attention(
        self, columns: Tensor, visible: Tensor | None, cached: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q = self.queries(columns)
        logits = self._logits(q, self.keys, visible)
        if self.past_keys is None:
            return logits[..., :0], logits.softmax(-1)
        earlier = self._logits(q, self.past_keys.to(q.dtype), cached)
        shares = torch.cat((earlier, logits), dim=-1).softmax(-1)
        return shares[..., : earlier.shape[-1]], shares[..., earlier.shape[-1] :]

    @torch.no_grad()
    def content_logits(self, columns: Tensor) -> Tensor:
        """(B, H, Q, P) float32 scores before the softmax, as if no positions were rotated."""
        keys = self._normed_late(self._plain_keys, "k")
        return self._logits(self.queries(columns, rotate=False), keys, None)

    @torch.no_grad()
    def closeness(self, columns: Tensor) -> Tensor:
        """(B, Q, P) float32 inner products, over the width, of a query and a key that are all ones
        before they are rotated: 1 where positions are equal, and everywhere without rotation.

        Args:
            columns: (B, Q) columns of the queries.
        """
        batch, total = self.hidden.shape[:2]
        width = self.rotary_width
        ones = torch.ones(batch, 1, total, width, device=self.hidden.device)
        if self._rotary is not None:
            parts = (part.expand(batch, -1, -1) for part in self._rotary)
            if not self._turns:
                parts = (part.float() for part in parts)
            ones = self.rotation(ones, ones, *parts)[1]
        keys = ones[:, 0]
        rows = torch.arange(batch, device=keys.device)[:, None]
        return torch.matmul(keys[rows, columns.to(keys.device)], keys.transpose(1, 2)) / width

    def _projection(self, name: str) -> Callable[[Tensor], Tensor]:
        """A projection. It is called and never read: quantised ones show no weight, or another."""
        found: Callable[[Tensor], Tensor] | None = getattr(self.attention_module, name, None)
        if found is None:
            raise UnsupportedModelError(
                f"attention scores need the projections of a decoder layer, but its "
                f"{type(self.attention_module).__name__} has no {name} (fused by a quantised "
                "model?); load the model without fused modules, or use a pre_llm method"
            )
        weight = getattr(found, "weight", None)
        if isinstance(weight, Tensor) and weight.is_meta and "_hf_hook" not in vars(found):
            raise UnsupportedModelError(
                "attention scores need the weights of the decoder layer, but they are offloaded "
                "without accelerate's hooks; load the model onto one device or use a pre_llm method"
            )
        return found

    def _without_gate(self, projected: Tensor) -> Tensor:
        """Queries (B, Q, H d) of a projection that makes a gate of each head's output too, after
        the head's queries: (B, Q, H 2d), as in Qwen3.5.
        """
        groups = getattr(self.attention_module, "num_key_value_groups", 1)
        heads = groups * self._plain_keys.shape[1]
        width = self.attention_module.head_dim
        if projected.shape[-1] != 2 * heads * width:
            return projected
        return projected.unflatten(-1, (heads, 2 * width))[..., :width].flatten(-2)

    def _heads(self, x: Tensor, part: str) -> Tensor:
        width = self.attention_module.head_dim
        module = head_norm_of(self.attention_module, part) or torch.nn.Identity()
        weight = getattr(module, "weight", None)
        over_heads = isinstance(weight, Tensor) and weight.shape[-1] != width
        if over_heads:
            x = module(x)
        x = x.view(*x.shape[:2], x.shape[-1] // width, width)
        if not over_heads:
            x = module(x)
        return x.transpose(1, 2)

    def _normed_late(self, x: Tensor, part: str) -> Tensor:
        """(B, H, P, d) rotated queries or keys, normed where that comes after."""
        module = late_head_norm_of(self.attention_module, part)
        return x if module is None else module(x)

    def _scaled(self, q: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Queries (B, H, Q, d) as Ministral 3 scales them, the more the later they are."""
        scale_of = position_scale_of(self.attention_module)
        if scale_of is None or self.positions is None:
            return q
        rope = self.attention_module.config.rope_parameters
        asking = self.positions.to(q.device).expand(q.shape[0], -1)[rows, columns]
        length = rope["original_max_position_embeddings"]
        return q * scale_of(asking, rope["llama_4_scaling_beta"], length).to(q.dtype)

    def _logits(self, q: Tensor, k: Tensor, visible: Tensor | None) -> Tensor:
        batch, heads, queries, width = q.shape
        together = heads // k.shape[1] * queries  # query heads of one key head
        grouped = q.reshape(batch, k.shape[1], together, width)
        logits = torch.matmul(grouped, k.transpose(-1, -2)) * self.scaling
        if (cap := getattr(self.attention_module, "attn_logit_softcapping", None)) is not None:
            logits = (logits / cap).tanh() * cap
        logits = logits.float().view(batch, heads, queries, k.shape[-2])
        return logits if visible is None else logits.masked_fill(~visible[:, None], -torch.inf)


def _norms_after(layer: Any) -> bool:
    """Whether norms follow the sublayers of a layer, so that attention reads states as they are."""
    if hasattr(layer, "input_layernorm"):
        config = getattr(mixer_of(layer), "config", None)  # as in Chameleon 30B
        return getattr(layer, "norm_after", False) or getattr(config, "swin_norm", False)
    return hasattr(layer, "post_feedforward_layernorm")


def turned(q: Tensor, k: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, N, d) whose pairs of neighbours are multiplied, as complex numbers,
    with (B, N, d / 2) turns.
    """

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns[:, None]).flatten(-2).type_as(x)

    return turn(q), turn(k)


def rotary_function(attention: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """What an attention module rotates its queries and keys with.

    Raises:
        UnsupportedModelError: its source file does not say.
    """
    kind = type(attention)
    function = getattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
    if function is None:
        raise UnsupportedModelError(
            f"{kind.__name__} has no apply_rotary_pos_emb beside it, so its attention cannot be "
            "computed"
        )
    if "q" in inspect.signature(function).parameters:
        return function

    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return function(q, cos, sin), function(k, cos, sin)

    return both
