"""Gate: which threads are inside a model, so that a session comes and goes between their calls."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import GenerationMixin

from foveate.errors import AttachError

PATIENCE = 5.0  # seconds after which a thread that waits says for whom
GRACE = 0.1  # seconds that a thread started within the session has to reach the model
POLL = 0.001


class Gate:
    """Counts the threads inside an attached model. One that leaves the session waits for them.

    A thread passes the gate on its outermost call and is inside until that call returns. While the
    gate closes, threads that are inside go on and others wait before it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}  # thread -> its calls that have not returned
        self._closing = False
        self._seen: WeakSet[threading.Thread] = WeakSet()  # threads that were ever inside
        self._before: WeakSet[threading.Thread] = WeakSet()  # those that ran before the session

    @contextmanager
    def opening(self) -> Iterator[None]:
        """While open, put things on: nobody comes in before all of them are there."""
        self._before, self._closing = WeakSet(threading.enumerate()), True
        try:
            yield
        finally:
            self._open()

    def _open(self) -> None:
        with self._changed:
            self._closing = False
            self._changed.notify_all()

    def __enter__(self) -> bool:
        """Come in. Returns whether this is the thread's outermost call."""
        me = threading.get_ident()
        if me in self._inside:  # only this thread changes its own entry
            self._inside[me] += 1
            return False
        with self._changed:
            while self._closing:
                self._changed.wait()
            self._inside[me] = 1
        self._seen.add(threading.current_thread())
        return True

    def __exit__(self, *error: object) -> None:
        me = threading.get_ident()
        if self._inside[me] > 1:
            self._inside[me] -= 1
            return
        with self._changed:
            del self._inside[me]
            self._changed.notify_all()

    def close(self, entries: Collection[Callable[..., Any]], undo: Callable[[], None]) -> None:
        """Wait until no other thread is inside, and call `undo` while none can come in.

        Args:
            entries: what threads call to come in; a thread that was started to call one of them is
                waited for, though it may not have begun.
            undo: takes the session off.

        Raises:
            AttachError: this thread is inside itself.
        """
        if threading.get_ident() in self._inside:
            raise AttachError(
                "a foveate session cannot be removed within a forward of its model; leave the "
                "block, or call `remove()`, after the forward has returned"
            )
        self._await_started(entries)
        try:
            with self._changed:
                self._closing = True
                while self._inside:
                    if not self._changed.wait(PATIENCE) and self._inside:
                        _warn(map(_name, self._inside), "to leave the model")
                undo()
        finally:
            self._open()

    def _await_started(self, entries: Collection[Callable[..., Any]]) -> None:
        """Let threads that were started within the session, and may be about to use the model,
        reach it: one that calls it directly for certain, others if they do so soon.
        """
        deadline = time.monotonic() + GRACE
        for thread in threading.enumerate():
            if thread in self._before or thread is threading.current_thread():
                continue
            target = _target(thread)
            certain = any(target is entry for entry in entries)
            while thread.is_alive() and thread not in self._seen:
                if not certain and time.monotonic() > deadline:
                    break
                time.sleep(POLL)


def is_within(module: nn.Module | None) -> bool:
    """Whether this thread is inside a call of a module."""
    calls = nn.Module._wrapped_call_impl.__code__
    return module is not None and _on_stack(module, calls)


def is_generating(model: nn.Module) -> bool:
    """Whether this thread is inside a model's `generate`."""
    return _on_stack(model, inspect.unwrap(GenerationMixin.generate).__code__)


def is_sampling(policy: nn.Module) -> bool:
    """Whether this thread is inside the method of a policy that samples actions, if it has one."""
    sample = getattr(type(policy), "sample_actions", None)
    return sample is not None and _on_stack(policy, inspect.unwrap(sample).__code__)


def _on_stack(module: nn.Module, code: Any) -> bool:
    """Whether a method of a module is running in this thread; of others, stacks are not safe to
    read.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def _target(thread: threading.Thread) -> Any:
    """What a thread was started to call, as long as it has not returned."""
    target = getattr(thread, "_target", None)
    while isinstance(target, functools.partial):
        target = target.func
    return target


def _name(ident: int) -> str:
    return next((t.name for t in threading.enumerate() if t.ident == ident), str(ident))


def _warn(names: Any, what: str) -> None:
    warnings.warn(
        f"foveate waits for {', '.join(names)} {what}; a thread that streams should be read, and "
        "joined, before the session is left",
        stacklevel=4,
    )
