"""Rows: values of some tokens among those of all."""

from __future__ import annotations

import torch
from torch import Tensor


def put_rows(x: Tensor, index: Tensor, values: Tensor, valid: Tensor | None = None) -> Tensor:
    """(G, V, D) values, some of which are others.

    Args:
        x: (G, V, D) values of all tokens.
        index: (G, K) which tokens get others, unique.
        values: (G, K, D) these.
        valid: (G, K) mask of those that do; `None` for all.
    """
    where = index[..., None].expand_as(values)
    if valid is not None:
        values = torch.where(valid[..., None], values, x.gather(1, where))
    return x.scatter(1, where, values.to(x.dtype))
