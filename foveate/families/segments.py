"""Attention in segments with a bias on the keys, from an attention module's own parts.

Attention modules that take the boundaries of segments (`cu_seqlens`) take no mask. Where merged
tokens count as often as they have sources, the segments are laid side by side, padded to the
longest, and go through the kernel with a mask.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_SCALING = ("scaling", "scale")
_DROPOUT = ("attention_dropout", "dropout")


def attend_segments(
    attention: Any,
    parts: tuple[Tensor, ...],
    output: str,
    bias: Tensor,
    kwargs: Mapping[str, Any],
) -> Tensor:
    """(N, D) what an attention module returns, had it taken a bias.

    Args:
        attention: the module, with a scale and, where it rotates, a rotary function beside it.
        parts: (N, H, d) its queries, keys and values, these of fewer heads where some share them;
            without rotary positions.
        output: its module that mixes the heads.
        bias: (N) what is added to the scores of each key.
        kwargs: with `cu_seqlens` (S + 1) and, where it rotates, `position_embeddings`: cos and sin
            (N, d).
    """
    module = sys.modules[type(attention).__module__]
    query, key, value = parts
    if (rotary := kwargs.get("position_embeddings")) is not None:
        query, key = module.apply_rotary_pos_emb_vision(query, key, *rotary)
    starts, lengths = kwargs["cu_seqlens"][:-1, None].long(), kwargs["cu_seqlens"].diff()[:, None]
    order = torch.arange(int(lengths.max()), device=bias.device)
    real = order < lengths
    slots = torch.where(real, starts + order, 0)
    mask = bias[slots].masked_fill(~real, torch.finfo(bias.dtype).min)[:, None, None]
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, module.eager_attention_forward
    )
    scaling, rate = (_of(attention, names) for names in (_SCALING, _DROPOUT))
    dropout = rate or 0.0 if attention.training else 0.0
    laid = (part[slots].transpose(1, 2) for part in (query, key, value))
    mixed, _ = kernel(attention, *laid, mask, scaling=scaling, dropout=dropout, is_causal=False)
    return getattr(attention, output)(mixed[real].flatten(1))


def _of(attention: Any, names: tuple[str, ...]) -> float | None:
    """What an attention module has under one of some names."""
    return next((getattr(attention, name) for name in names if hasattr(attention, name)), None)
