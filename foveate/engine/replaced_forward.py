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
            _set(mine, name, self.before if kept else _own(self.module))


def take_off(placed: list[ReplacedForward]) -> None:
    """Take forwards off, the last first, and out of the list; what is left there if this is
    interrupted is still to be taken off.
    """
    while placed:
        placed[-1].take_off()
        placed.pop()


def forward_of(module: nn.Module, before: Callable[..., Any] | None) -> Callable[..., Any]:
    """The forward that a module had before it was replaced: its own, or its class's, which is
    looked up at each call because classes change under FSDP2.
    """
    return before or functools.partial(type(module).forward, module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody other than accelerate has given a module a forward of its own."""
    mine = vars(module)
    own = mine.get(WITHIN if "_hf_hook" in mine and WITHIN in mine else "forward")
    return own is not None and own != _own(module)


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


def _set(attributes: dict[str, Any], name: str, value: object) -> None:
    if value is None:
        attributes.pop(name, None)
    else:
        attributes[name] = value
