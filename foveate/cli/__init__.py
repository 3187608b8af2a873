"""The `foveate` command."""

from typing import TYPE_CHECKING

from foveate.cli.interrupts import CtrlC
from foveate.lazy import exports

if TYPE_CHECKING:
    from foveate.cli.commands import app
else:
    __getattr__, __dir__ = exports(__name__, {"foveate.cli.commands": ("app",)})

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the `foveate` command."""
    with CtrlC().listening():
        from foveate.cli.commands import app  # late: so that Ctrl-C is answered meanwhile

        app()
