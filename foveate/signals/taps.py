"""Taps: forward hooks on parts of a module that may be replaced, as adapters do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@dataclass
class _Tap:
    parent: nn.Module
    name: str
    hook: Callable[..., Any]
    module: nn.Module
    handle: RemovableHandle


class Taps:
    """Forward hooks on children of modules."""

    def __init__(self) -> None:
        self._taps: list[_Tap] = []

    def add(self, parent: nn.Module, name: str, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, output)` after the forward of whatever child has a name."""
        module = getattr(parent, name)
        handle = module.register_forward_hook(hook)
        self._taps.append(_Tap(parent, name, hook, module, handle))

    def refresh(self) -> None:
        """Follow children that were replaced; an adapter gives more than its inner layer."""
        for tap in self._taps:
            module = getattr(tap.parent, tap.name)
            if module is not tap.module:
                tap.handle.remove()
                tap.module, tap.handle = module, module.register_forward_hook(tap.hook)

    def remove(self) -> None:
        """Take all hooks off."""
        for tap in self._taps:
            tap.handle.remove()
        self._taps.clear()
