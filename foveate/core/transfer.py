"""Transfers between the host and the device, of which few may wait.

To read a value of a tensor, the host waits until the device has done all that it was given before.
So what is needed of a forward is read together. The way up does not wait: the driver has taken the
values before the call returns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Tensor | Sequence[Any], device: torch.device) -> Tensor:
    """Values of the host on the device, which nobody waits for; what is there already stays.

    Args:
        values: a tensor, or numbers in nested lists.
        device: where they go.
    """
    return torch.as_tensor(values).to(device, non_blocking=True)


def members_of(x: Tensor, members: Sequence[int]) -> Tensor:
    """Rows of (G, ...) named on the host, ascending."""
    return x if len(members) == len(x) else x.index_select(0, upload(members, x.device))


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the host, of numbers without fractions, for which the host waits once; what is
    there already stays.
    """
    away = [x for x in tensors if x.device.type != "cpu"]
    if not away:
        return list(tensors)
    flat = torch.cat([x.flatten().to(away[0].device, torch.int64) for x in away]).cpu()
    parts = iter(flat.split([x.numel() for x in away]))
    return [x if x.device.type == "cpu" else next(parts).view(x.shape).to(x.dtype) for x in tensors]


class Downloads:
    """Copies on the host, by what they are copies of, which is read once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # holds on to what ids stand for

    def fetch(self, tensors: Iterable[Any]) -> None:
        """Read tensors that are not known yet, together; anything else is passed over."""
        new = {id(x): x for x in tensors if isinstance(x, Tensor) and id(x) not in self._known}
        copies = download(list(new.values()))
        self._known |= {key: (x, c) for (key, x), c in zip(new.items(), copies, strict=True)}

    def of(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor."""
        self.fetch([tensor])
        return self._known[id(tensor)][1]

    def arguments(
        self, arguments: Mapping[str, Any], names: Collection[str] = ()
    ) -> dict[str, Any]:
        """Arguments whose tables, such as grids and sizes of images, are copies, and some others.

        Args:
            arguments: the arguments.
            names: the others, if they are there.
        """
        read = tables(arguments, names)
        self.fetch(read.values())
        return {**arguments, **{name: self.of(value) for name, value in read.items()}}


def tables(arguments: Mapping[str, Any], names: Collection[str] = ()) -> dict[str, Tensor]:
    """Arguments that list integers, or few together, such as sizes of images or places of patches,
    and others of some names.
    """
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    return {name: value for name, value in given.items() if name in names or _lists(value)}


def _lists(value: Tensor) -> bool:
    numbers = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return numbers and (value.dim() == 1 or (value.dim() in (2, 3) and value.shape[-1] <= 4))
