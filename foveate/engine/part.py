"""Part: something that a session attaches to a model, and that takes itself off again."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from foveate.errors import AttachError

MARK = "_foveate_part"  # the attribute of a root that holds the part on it


class Part(ABC):
    """One part of a session: what it touches on one part of the model, and how to undo it."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self.session: object = None  # the session that it is a part of
        self.uncompiled = False  # whether torch.compile is kept from tracing hooks

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

    def undo(self, last: Callable[[], object]) -> None:
        """Call something when the part is taken off."""
        self._undo.append(last)

    @property
    def taken(self) -> bool:
        """Whether the root carries a part, of this session or another."""
        return MARK in vars(self.root)

    def mark(self) -> None:
        """Put the part on its root, as long as it is attached."""
        self._put(self.root, MARK, self)
        self._put(self.root, "_replicate_for_data_parallel", self._refuse_replicas)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Not supported: a copy of the model would run with what is known of the original.

        Raises:
            AttachError: always.
        """
        raise AttachError(
            f"a {type(self.root).__name__} that carries a foveate session cannot be copied or "
            "pickled; leave the session or call `remove()` on it first (session_of(model).remove() "
            "after `prepare`), then attach methods to each copy"
        )

    def _refuse_replicas(self) -> nn.Module:
        raise AttachError(
            f"a {type(self.root).__name__} that carries a foveate session cannot be replicated by "
            "torch.nn.DataParallel: run one process per device instead, as with torchrun, and "
            "attach methods in each"
        )

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before a module's forward."""
        hook = self._hidden(hook)
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def behind(self, module: nn.Module, hook: Callable[..., Any], always: bool = False) -> None:
        """Call `hook(module, args, output)` after a module's forward; `always` also if it
        raised.
        """
        hook = self._hidden(hook)
        self._undo.append(module.register_forward_hook(hook, always_call=always).remove)

    def watch(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs, output)` after a module's forward."""
        hook = self._hidden(hook)
        self._undo.append(module.register_forward_hook(hook, with_kwargs=True).remove)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Call `forward(module, before, ...)` in place of a module's forward.

        `before` is a forward that the module has of its own, else `None`. A hook before each of
        many modules would take longer than small modules themselves. What `forward` calls is
        compiled where it itself is not.
        """
        before = vars(module).get("forward")
        replaced = functools.partial(self._hidden(forward, recursive=False), module, before)
        functools.update_wrapper(replaced, module.forward)
        self._put(module, "forward", replaced)

    def hide(self, name: str) -> None:
        """Keep torch.compile from tracing one of the part's own methods, where that is wanted."""
        if self.uncompiled:
            self._put(self, name, self._hidden(getattr(self, name)))

    def _put(self, module: object, name: str, value: object) -> None:
        """Give a module an attribute of its own, until the part is taken off."""
        before = vars(module).get(name)
        setattr(module, name, value)
        self._undo.append(
            lambda: delattr(module, name) if before is None else setattr(module, name, before)
        )

    def _hidden(self, hook: Callable[..., Any], recursive: bool = True) -> Callable[..., Any]:
        """A hook that torch.compile does not trace, where that is wanted: hooks keep state. Nor
        what it calls, if `recursive`.
        """
        if not self.uncompiled:
            return hook
        return torch.compiler.disable(hook, recursive=recursive)

    def wrap(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        """Call `around(original, ...)` in place of a method of a module."""
        original = getattr(module, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        around = self._hidden(around, recursive=False)  # the original may be compiled
        self._put(module, name, self._hidden(wrapper, recursive=False))


def forward_of(module: nn.Module, before: Callable[..., Any] | None) -> Callable[..., Any]:
    """The forward that a module had before it was replaced: its own, or its class's, which is
    looked up at each call because classes change under FSDP2.
    """
    return before or functools.partial(type(module).forward, module)
