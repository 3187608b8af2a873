"""Decoding steps through layers in which some heads do not read visual tokens.

Their cache says which slots those are, and that does not change from step to step: so what such
heads may not read is written down once for many steps.

Shapes: `B` batch, `S` cache slots, `H` query heads, `Hkv` key-value heads, `R` = H / Hkv, `d` head
width, `D` hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core import PartialCompute
from foveate.families.decoder_layer import heads_of
from foveate.signals.layer_view import rotary_function

ROOM = 128  # steps that a mask is made for


@dataclass(frozen=True, eq=False)
class Unread:
    """What the heads of a layer do not read.

    Args:
        visual: (B, at most S) which slots are visual; those after it are not.
        mask: (B, Hkv, R, S and more) 0, or the least number where a head does not read a slot;
            `None` if the layer itself does right.
    """

    visual: Tensor
    mask: Tensor | None

    @classmethod
    def of(
        cls, attention: Any, work: PartialCompute, visual: Tensor, slots: int, dtype: Any
    ) -> Unread:
        """Write down what a layer's heads do not read.

        Args:
            attention: its module.
            work: what the layer does for visual tokens.
            visual: (B, at most S), as above.
            slots: how many there are, S.
            dtype: of the mask.
        """
        active = work.heads or (True,) * heads_of(attention)
        blind = torch.tensor([not (work.reads_visual and on) for on in active])
        blind = blind.view(-1, attention.num_key_value_groups, 1)
        # What is not read stays in the softmax, with values of zero if no head of its group reads.
        lost = not work.renormalize and bool((blind.all(1) == blind.any(1)).all())
        if lost or not blind.any():
            return cls(visual, None)
        unread = F.pad(visual, (0, slots + ROOM - visual.shape[1]))[:, None, None]
        unread = unread & blind.to(visual.device)
        mask = torch.zeros(unread.shape, dtype=dtype, device=visual.device)
        return cls(visual, mask.masked_fill_(unread, torch.finfo(dtype).min))

    def serves(self, visual: Tensor, slots: int) -> bool:
        """Whether it is about these visual slots, and long enough."""
        return self.visual is visual and (self.mask is None or self.mask.shape[-1] >= slots)


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B or 1, 1, 1, S) what any kernel's mask of one query adds to scores.

    Args:
        mask: (B, S), or (B or 1, 1, 1, S), boolean or additive.
        dtype: of the result.
    """
    if mask is None or mask.is_floating_point():
        return mask
    mask = mask if mask.dim() == 4 else mask[:, None, None]
    zero = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zero.masked_fill_(mask.logical_not(), torch.finfo(dtype).min)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    unread: Tensor,
    mask: Tensor | None,
    scale: float,
    *,
    renormalize: bool,
) -> Tensor:
    """(B, Hkv, R, d) of queries (B, Hkv, R, d) to keys and values (B, Hkv, S, d).

    What is not read gets no weight: before the softmax, so that the others share it, or after.
    """
    if renormalize:
        mask = unread if mask is None else torch.minimum(mask, unread)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    scores = q @ k.transpose(2, 3) * scale
    scores = scores if mask is None else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    return weights.masked_fill(unread < 0, 0.0) @ v


def run_step(
    layer: Any,
    work: PartialCompute,
    masks: tuple[Tensor, Tensor | None],
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: Any,
) -> Tensor:
    """A decoder layer, for one token of each row after visual tokens.

    Args:
        layer: its module.
        work: what it does for visual tokens.
        masks: (B, Hkv, R, S) of what heads do not read, see `Unread`; and (B or 1, 1, 1, S) what
            is added to the scores of all heads.
        hidden: (B, 1, D) its input.
        rotary: cos and sin of the token.
        cache: the key-value cache.

    Returns:
        (B, 1, D) its output.
    """
    module, batch, (unread, mask) = layer.self_attn, len(hidden), masks
    x = layer.input_layernorm(hidden)
    q, k, v = (
        project(x).view(batch, 1, -1, module.head_dim)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if getattr(module, "q_norm", None) is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    q, k = rotary_function(module)(q.transpose(1, 2), k.transpose(1, 2), *rotary)
    k, v = cache.update(k, v.transpose(1, 2), module.layer_idx)
    q = q.view(batch, k.shape[1], -1, module.head_dim)  # no head of keys is repeated
    x = _attention(q, k, v, unread, mask, module.scaling, renormalize=work.renormalize)
    hidden = hidden + module.o_proj(x.reshape(batch, 1, -1))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
