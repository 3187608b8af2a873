"""Information flow between the class token and the patches of an encoder layer (FlowCut)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def information_flow(
    attention: Tensor, value: Tensor, special: int = 1, bias: Tensor | None = None
) -> Tensor:
    """How much each patch tells the class token in one layer.

    The class token's attention, and the softmax of its value's products with all values, both as
    shares of what the patches have together, times the L1 size of a patch's mean value.

    Args:
        attention: (B, H, V) attention of the class token to the patches.
        value: (B, S + V, D) projected values; row 0 is the class token's.
        special: S, rows before the patches.
        bias: (B, 1, 1, S + V) what the encoder adds to the scores of keys.

    Returns:
        (B, V) float32.
    """
    values = value.unflatten(-1, (attention.shape[1], -1)).transpose(1, 2).float()
    products = torch.matmul(values[:, :, :1], values.mT)[:, :, 0]  # unscaled, as released
    if bias is not None:
        products = products + bias[:, 0]
    likeness = products.softmax(-1).mean(1)[:, special:]
    size = values.mean(1).abs().sum(-1)[:, special:]
    return (_shares(attention.mean(1)) + _shares(likeness)) * size


def _shares(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
