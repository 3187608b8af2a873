"""Attention of one text token to everything before it, in one decoder layer, without an attention
map.

The layer's own norm, projections, rotary embedding and scaling are used, so the row equals that of
eager attention.
Cost: one key projection of the columns and one query row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.errors import UnsupportedModelError


@torch.no_grad()
def text_attention(
    layer: Any,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    query: Tensor,
    visible: Tensor | None,
    past: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Softmax attention of one query per row, over the layer's cached keys and the columns of this
    forward.

    Args:
        layer: a decoder layer, about to run on `hidden`.
        hidden: (B, P, D) its input.
        rotary: cos and sin, (B or 1, P, d) each; `None` for a layer without rotary positions.
        query: (B) column of the query in each row.
        visible: (B, P) columns the query may see, or `None` for all.
        past: cached keys (B, Hkv, S, d), already rotated, and which of them the query may see (B,
            S).

    Returns:
        (B, H, P) float32 probabilities of the P columns; with cached keys they do not sum to one.

    Raises:
        UnsupportedModelError: the layer's weights are offloaded.
    """
    attention = layer.self_attn
    if attention.k_proj.weight.is_meta:
        raise UnsupportedModelError(
            "attention scores need the weights of the decoder layer, but they are offloaded; "
            "load the model onto one device or use a pre_llm method"
        )
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    query = query.to(hidden.device)
    # Where norms follow the sublayers, attention reads the states as they are.
    normed = hidden if getattr(layer, "norm_after", False) else layer.input_layernorm(hidden)
    q = _heads(attention.q_proj(normed[rows, query][:, None]), attention, "q_norm")
    k = _heads(attention.k_proj(normed), attention, "k_norm")
    if rotary is not None:
        rotate = _rotary_function(attention)
        cos, sin = (part.expand(hidden.shape[0], -1, -1) for part in rotary)
        q, _ = rotate(q, q, cos[rows, query][:, None], sin[rows, query][:, None])
        _, k = rotate(k[:, :1], k, cos, sin)
    logits = _logits(q, k, attention, visible)
    if past is None:
        return logits.softmax(-1)
    earlier = _logits(q, past[0].to(q.dtype), attention, past[1])
    return torch.cat((earlier, logits), dim=-1).softmax(-1)[..., earlier.shape[-1] :]


def _heads(x: Tensor, attention: Any, norm: str) -> Tensor:
    module = getattr(attention, norm, None) or torch.nn.Identity()
    over_heads = getattr(module, "weight", x).shape[-1] != attention.head_dim
    if over_heads:
        x = module(x)
    x = x.view(*x.shape[:2], -1, attention.head_dim)
    if not over_heads:
        x = module(x)
    return x.transpose(1, 2)


def _rotary_function(attention: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if function is None:
        raise UnsupportedModelError(
            f"{type(attention).__name__} has no apply_rotary_pos_emb beside it, so its attention "
            "cannot be scored"
        )
    return function


def _logits(q: Tensor, k: Tensor, attention: Any, visible: Tensor | None) -> Tensor:
    batch, heads, _, width = q.shape
    grouped = q.view(batch, k.shape[1], -1, width)  # query heads of one key head side by side
    logits = torch.matmul(grouped, k.transpose(-1, -2)) * attention.scaling
    if (cap := getattr(attention, "attn_logit_softcapping", None)) is not None:
        logits = (logits / cap).tanh() * cap
    logits = logits.float().view(batch, heads, -1)
    if visible is None:
        return logits
    return logits.masked_fill(~visible[:, None], -torch.inf)
