"""ReplacedForward: a forward in place of a module's, among those that others put there.

Accelerate, profilers and torch.compile put forwards of their own on the same modules, before and
within a session, and take them off when they like.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from foveate.errors import AttachError

PLACED = "_foveate_placed"  # what a forward that was put on knows of itself
WITHIN = "_old_forward"  # where accelerate's hooks keep the forward that they call


class Life:
    """Whether what was put on still acts; each time that a session is attached has its own."""

    on = True


@dataclass(eq=False)
class ReplacedForward:
    """A forward in place of a module's.

    Args:
        module: the module.
        name: the attribute that was set.
        before: the value of that attribute, if the module had one of its own.
        forward: what it was set to.
        life: whether that still acts.
    """

    module: nn.Module
    name: str
    before: Callable[..., Any] | None
    forward: Callable[..., Any]
    life: Life

    def put_on(self) -> None:
        """Give the module this forward."""
        vars(self.forward)[PLACED] = self
        vars(self.module)[self.name] = self.forward

    def put_back(self) -> None:
        """Put the forward on again if it is known that nothing leads to it any more."""
        mine = vars(self.module)
        if any(value is self.forward for value in mine.values()):
            return  # accelerate has put its own around it
        now = mine.get("forward")
        within: Any = now
        while within is not None and within is not self.forward:
            within = getattr(within, "__wrapped__", None)
        earlier = getattr(now, PLACED, None)
        bare = now is None or now == _own(self.module) or (earlier and not earlier.life.on)
        if within is None and (bare or now is self.before):
            self.before = None if now == _own(self.module) else now
            mine["forward"] = self.forward

    def take_off(self) -> None:
        """Put the module's forward back wherever this one was kept. One that others have wrapped
        stays within, and does nothing any more.
        """
        mine = vars(self.module)
        for name in [name for name, value in mine.items() if value is self.forward]:
            kept = name == self.name == "forward" or self.before is not None
            set_or_remove(mine, name, self.before if kept else _own(self.module))


def forward_of(module: nn.Module, before: Callable[..., Any] | None) -> Callable[..., Any]:
    """The forward that a module had before it was replaced: its own, or its class's, which is
    looked up at each call because classes change under FSDP2.
    """
    return before or functools.partial(type(module).forward, module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody other than accelerate has given a module a forward of its own."""
    own = vars(module).get(name_of_forward(module))
    return own is not None and own != _own(module)


def name_of_forward(module: nn.Module) -> str:
    """The attribute that holds a module's forward; accelerate keeps it within its own."""
    mine = vars(module)
    return WITHIN if "_hf_hook" in mine and WITHIN in mine else "forward"


def set_or_remove(attributes: dict[str, Any], name: str, value: object) -> None:
    """Set an attribute, or remove it where the value is `None`."""
    if value is None:
        attributes.pop(name, None)
    else:
        attributes[name] = value


def bypassed(module: nn.Module) -> AttachError:
    """What to raise of an answer that was made without the forward put on a module."""
    return AttachError(
        f"the forward that foveate put on a {type(module).__name__} was replaced or taken off "
        "within the session, so this answer was not made with the tokens that were kept; put other "
        "forwards on before the session, or let them call what was there"
    )


def _own(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module's class, as others keep it."""
    return MethodType(type(module).forward, module)
