"""Part: something that a session attaches to a model, and that takes itself off again."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn


class Part(ABC):
    """One part of a session: what it touches on one part of the model, and how to undo it."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self.session: object = None  # the session that it is a part of

    @property
    @abstractmethod
    def root(self) -> nn.Module:
        """The module that carries the part; it can carry only one."""

    @abstractmethod
    def check(self) -> None:
        """Refuse what cannot be attached to.

        Raises:
            UnsupportedModelError: the attention kernel is not supported.
        """

    @abstractmethod
    def attach(self) -> None:
        """Install everything."""

    def remove(self) -> None:
        """Take everything off; the model is as it was. Removing twice does no harm."""
        while self._undo:
            self._undo.pop()()

    @property
    def taken(self) -> bool:
        """Whether the root carries a part, of this session or another."""
        hooks = self.root._forward_pre_hooks.values()
        return any(isinstance(getattr(hook, "__self__", None), Part) for hook in hooks)

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before a module's forward."""
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def behind(self, module: nn.Module, hook: Callable[..., Any], always: bool = False) -> None:
        """Call `hook(module, args, output)` after a module's forward; `always` also if it
        raised.
        """
        self._undo.append(module.register_forward_hook(hook, always_call=always).remove)

    def watch(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs, output)` after a module's forward."""
        self._undo.append(module.register_forward_hook(hook, with_kwargs=True).remove)

    def wrap(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        """Call `around(original, ...)` in place of a method of a module."""
        original = getattr(module, name)
        before = vars(module).get(name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        setattr(module, name, wrapper)
        self._undo.append(
            lambda: delattr(module, name) if before is None else setattr(module, name, before)
        )
