"""What a model is called with, as values that can be compared: shapes, and small whole numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

Frozen: TypeAlias = tuple[tuple[str, Any], ...]
VALUES = 4096  # larger tensors of zeros and ones are masks of pixels, on which no count depends


def freeze(arguments: Mapping[str, Any]) -> Frozen:
    """Arguments as a hashable value: shapes of tensors, values of small integer tensors."""
    return tuple((name, frozen(value)) for name, value in sorted(arguments.items()))


def frozen(value: Any) -> Any:
    """A value that is equal where a count is: the shape of a tensor, and values of a small one."""
    if not isinstance(value, Tensor):
        return _Value(value)
    shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    if value.is_floating_point() or value.is_meta or (value.numel() > VALUES and _is_mask(value)):
        return shape, dtype, None
    return shape, dtype, tuple(value.flatten().tolist())


def _is_mask(value: Tensor) -> bool:
    low, high = value.aminmax()
    return int(low) >= 0 and int(high) <= 1


@dataclass(frozen=True)
class _Value:
    """Something that is no tensor, compared by how it is written."""

    value: Any = field(compare=False, repr=False)
    text: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", repr(self.value))


def thaw(value: Any) -> Any:
    """What `frozen` was made of, floating-point tensors on the meta device."""
    if isinstance(value, _Value):
        given = value.value
        sizes = isinstance(given, list | tuple) and given and isinstance(given[0], list | tuple)
        return torch.tensor(given) if sizes else given
    shape, name, values = value
    dtype = getattr(torch, name)
    if values is not None:
        return torch.tensor(values, dtype=dtype).view(shape)
    return torch.ones(shape, dtype=dtype, device="meta" if dtype.is_floating_point else "cpu")
