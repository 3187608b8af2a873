"""Ctrl-C: one line that says what was kept and how to go on, and an end within two seconds."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = "run the same command again to continue"
NOTHING = "nothing new was saved"
CODE = 130
"""Exit code after Ctrl-C, as shells have it."""
PATIENCE = 1.5
"""Seconds that the work has to end after Ctrl-C."""


class CtrlC:
    """Handler of SIGINT: raises KeyboardInterrupt, and ends the process if that is not enough.

    Libraries may swallow the exception or take it for another one, so the handler remembers that it
    came. What a command keeps is pushed on `kept` by `keeping`.
    """

    def __init__(self) -> None:
        self.kept: list[Callable[[], str]] = []
        self.pressed = self.told = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Answer Ctrl-C for the rest of this process."""
        signal.signal(signal.SIGINT, self)
        try:
            yield
        except BaseException:
            if self.pressed:  # whatever a library made of it
                self.end()
            raise

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C was pressed; a second time, the process ends at once."""
        if self.pressed:
            self.end()
        self.pressed = True
        timer = threading.Timer(PATIENCE, self.end)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    def tell(self, text: str = "") -> None:
        """Print the line, once.

        Args:
            text: what was kept; by default what the innermost `keeping` says.
        """
        if not self.told:
            self.told = True
            from rich.markup import escape

            from foveate.cli.console import stderr  # late: the handler is there before rich is

            text = text or (self.kept[-1]() if self.kept else NOTHING)
            stderr().print(f"[yellow]interrupted:[/] {escape(text)}", soft_wrap=True)

    def end(self) -> None:
        """End the process now, without waiting for what it runs."""
        self.tell()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(CODE)  # the clean-up of libraries may take seconds


class Interrupted(KeyboardInterrupt):
    """Ctrl-C where something was kept; its text says what, and how to go on."""


@contextmanager
def keeping(say: Callable[[], str]) -> Iterator[None]:
    """Say what is kept if the block is interrupted.

    Args:
        say: makes the text, after the interruption.

    Raises:
        Interrupted: the block was interrupted.
    """
    handler = _handler()
    handler.kept.append(say)
    try:
        yield
    except BaseException as error:
        if handler.pressed or isinstance(error, KeyboardInterrupt):
            raise Interrupted(say()) from None
        raise
    finally:
        handler.kept.pop()


def answer_interrupt(error: BaseException) -> bool:
    """Print the line if an error comes of Ctrl-C, whatever a library has made of it.

    Args:
        error: what came out of a command.

    Returns:
        Whether it does.
    """
    handler = _handler()
    if not (handler.pressed or isinstance(error, KeyboardInterrupt)):
        return False
    handler.tell(str(error) if isinstance(error, Interrupted) else "")
    return True


def _handler() -> CtrlC:
    """The handler of this process; one of no effect where the library is called otherwise."""
    found = signal.getsignal(signal.SIGINT)
    return found if isinstance(found, CtrlC) else CtrlC()
