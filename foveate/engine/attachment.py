"""Attachment: what one side of a session puts on a model, and how it takes that off again.

Everything goes on a module as an attribute of its own: a `forward`, or another method. Hooks of
torch would be lost on code that was compiled before, and cost more. Others put their own things on
the same modules, before and within a session (accelerate, profilers), and take them off when they
like. So what is put on acts only while the attachment lasts, and is looked after till then.
"""

from __future__ import annotations

import functools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from foveate.engine.compilation import tracing, untraced
from foveate.engine.gate import Gate, is_within
from foveate.engine.replaced_forward import (
    PLACED,
    WITHIN,
    Life,
    ReplacedForward,
    bypassed,
    forward_of,
    take_off,
)
from foveate.errors import AttachError

MARK = "_foveate_attachment"  # the attribute of a root that holds what is attached to it


@dataclass
class _Tap:
    parent: nn.Module
    name: str
    hook: Callable[..., Any]
    module: nn.Module


class Attachment(ABC):
    """One side of a session: what it touches on one part of the model, and how to undo it.

    Args:
        gate: counts the threads inside the model; it is the session's.
    """

    mark: ClassVar[str] = MARK

    def __init__(self, gate: Gate) -> None:
        self.session: object = None  # the session that it belongs to
        self.gate = gate
        self.entries: list[Callable[..., Any]] = []  # methods that threads are started with
        self._compiled = False  # whether compiled code has come by
        self._life = Life()
        self._undo: list[Callable[[], object]] = []
        self._placed: list[ReplacedForward] = []
        self._taps: list[_Tap] = []

    @property
    @abstractmethod
    def root(self) -> nn.Module:
        """The module that carries the attachment; it can carry only one."""

    @abstractmethod
    def check(self) -> None:
        """Refuse what cannot be attached to.

        Raises:
            UnsupportedModelError: the attention kernel is not supported.
        """

    @abstractmethod
    def attach(self) -> None:
        """Install everything."""

    # -- life

    def claim(self) -> bool:
        """Mark the root as taken until the attachment is removed. Returns whether it was free."""
        root = self.root
        if self._undo or vars(root).setdefault(self.mark, self) is not self:
            return False
        self._life = Life()
        self.undo(lambda: vars(root).pop(self.mark, None))
        self.undo(lambda: take_off(self._placed))
        self.put(root, "_replicate_for_data_parallel", self._refuse_replicas)
        return True

    def remove(self) -> None:
        """Take everything off; the model is as it was. Removing twice does no harm."""
        self._life.on = False
        while self._undo:
            self._undo[-1]()  # again if this is interrupted
            self._undo.pop()
        if self._compiled:  # it is full of graph breaks of this session, and would be used further
            torch.compiler.reset()
            self._compiled = False
        self._taps.clear()
        self.entries.clear()

    def undo(self, last: Callable[[], object]) -> None:
        """Call something on removal; more than once if that is interrupted."""
        self._undo.append(last)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Not supported: a copy of the model would run with what is known of the original.

        Raises:
            AttachError: always.
        """
        return self._refuse_copies()

    def _refuse_copies(self) -> Any:
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

    def uncopied(self, *modules: nn.Module) -> None:
        """Refuse copies of modules that share their parts, as `copy.copy` makes them."""
        for module in modules:
            self.put(module, "__getstate__", self._refuse_copies)

    # -- putting things on

    def put(self, module: object, name: str, value: object) -> None:
        """Give a module an attribute of its own, until it is taken off."""
        mine = vars(module)
        had, before = name in mine, mine.get(name)

        def back() -> None:
            if mine.get(name) is not value:
                return
            if had:
                mine[name] = before
            else:
                del mine[name]

        self.undo(back)
        mine[name] = value

    def replace_forward(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        *,
        outer: bool = False,
        below: nn.Module | None = None,
        anchor: bool = False,
    ) -> None:
        """Call `forward(module, before, ...)` in place of a module's forward.

        `before` is a forward that the module has of its own, else `None`. What `forward` calls is
        compiled where the model is; it itself is not.

        Args:
            module: the module.
            forward: what to call.
            outer: whether a thread may come into the model there.
            below: a module that calls this one; if a thread comes from there, its call has begun
                before the session was attached, and goes on without.
            anchor: whether to refuse what the module returns if a call does not come there.
        """
        name = WITHIN if "_hf_hook" in vars(module) and WITHIN in vars(module) else "forward"
        life, gate = self._life, self.gate if outer else None
        arrived = self._anchor(module) if anchor else None

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if arrived is not None:
                arrived()
            if gate is not None:
                with gate as outermost:
                    if life.on and not (outermost and is_within(below)):
                        self._come_in()
                        return forward(module, placed.before, *args, **kwargs)
            elif life.on:
                return forward(module, placed.before, *args, **kwargs)
            return forward_of(module, placed.before)(*args, **kwargs)

        placed = ReplacedForward(module, name, vars(module).get(name), replaced, life)
        functools.update_wrapper(untraced(replaced), placed.before or module.forward)
        vars(replaced)[PLACED] = placed
        self._placed.append(placed)
        vars(module)[name] = replaced

    def _come_in(self) -> None:
        """See whether compiled code has come by, and refuse what records one run for all.

        Raises:
            AttachError: torch.jit.trace or torch.export calls the model.
        """
        self._compiled |= tracing() not in (None, False)
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise AttachError(
                f"a {type(self.root).__name__} that carries a foveate session cannot be traced or "
                "exported, as what is removed depends on the images; leave the session first, or "
                "call `remove()` on it"
            )

    def _anchor(self, module: nn.Module) -> Callable[[], None]:
        """See which calls of a module come to the forward in its place, which says so by what is
        returned; refuse what others return.
        """
        local = threading.local()

        def arrived() -> None:
            local.missing = False

        def begin(*_: Any) -> None:
            local.missing = True

        def end(*_: Any) -> None:
            if getattr(local, "missing", False):
                local.missing = False
                self.look_after()
                raise bypassed(module)

        for register, hook in (
            (module.register_forward_pre_hook, begin),
            (module.register_forward_hook, end),
        ):
            self.undo(register(torch.compiler.disable(hook)).remove)
        return arrived

    def hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before a module's forward, whoever replaces that
        forward, or calls it and not the module; it may return others. Code that was compiled before
        sees no hook, but it sees that the forward is another.
        """
        hook, local = torch.compiler.disable(hook), threading.local()

        @torch.compiler.disable
        def begin(*call: Any) -> Any:
            local.begun = False  # to the end, if the hook refuses the call
            changed = hook(*call)
            local.begun = True
            return changed

        @untraced
        def forward(module: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
            if not vars(local).pop("begun", False):  # nobody has called the module
                args, kwargs = hook(module, args, kwargs) or (args, kwargs)
            return forward_of(module, own)(*args, **kwargs)

        self.replace_forward(module, forward)
        handle = module.register_forward_pre_hook(begin, with_kwargs=True)
        self.undo(handle.remove)

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before a module's forward; it may return others."""
        hook = torch.compiler.disable(hook)

        @untraced
        def forward(module: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = hook(module, args, kwargs) or (args, kwargs)
            return forward_of(module, own)(*args, **kwargs)

        self.replace_forward(module, forward)

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs, output)` after a module's forward."""
        hook = torch.compiler.disable(hook)

        @untraced
        def forward(module: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
            output = forward_of(module, own)(*args, **kwargs)
            hook(module, args, kwargs, output)
            return output

        self.replace_forward(module, forward)

    def tap(self, parent: nn.Module, name: str, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs, output)` after the forward of whatever child of a module
        has a name.
        """
        module = getattr(parent, name)
        self._taps.append(_Tap(parent, name, hook, module))
        self.after(module, hook)

    def wrap(
        self,
        module: nn.Module,
        name: str,
        around: Callable[..., Any],
        *,
        outer: bool = False,
        below: nn.Module | None = None,
        late: Callable[..., Any] | None = None,
    ) -> Callable[..., Any]:
        """Call `around(original, ...)` in place of a method of a module.

        Args:
            module: the module.
            name: the method.
            around: what to call; it is not compiled, what it calls is.
            outer: whether a thread may come into the model there.
            below: as in `replace_forward`.
            late: called instead if somebody has kept the method and calls it when it is off again.

        Returns:
            What the module has in place of the method.
        """
        original, life = getattr(module, name), self._life
        gate = self.gate if outer else None
        kept = False  # whether it can be called after it was taken off only if somebody kept it

        def leave() -> None:
            nonlocal kept
            kept = kept or vars(module).get(name) is wrapper

        @untraced
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if gate is not None:
                with gate as outermost:
                    if life.on and not (outermost and is_within(below)):
                        self._come_in()
                        return around(original, *args, **kwargs)
            elif life.on:
                return around(original, *args, **kwargs)
            if late is not None and kept:
                late(*args, **kwargs)
            return original(*args, **kwargs)

        self.put(module, name, wrapper)
        self.undo(leave)
        return wrapper

    # -- looking after them

    def look_after(self) -> None:
        """Put back what others have taken off when they took off something of their own, and
        follow children that were replaced, as adapters do: these give more than the inner layer.
        """
        for placed in self._placed:
            if vars(placed.module).get(placed.name) is not placed.forward:
                placed.put_back()
        for tap in self._taps:
            module = getattr(tap.parent, tap.name)
            if module is not tap.module:
                for placed in [p for p in self._placed if p.module is tap.module]:
                    placed.take_off()
                    self._placed.remove(placed)
                tap.module = module
                self.after(module, tap.hook)
