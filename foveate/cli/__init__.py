"""The `foveate` command."""

from foveate.cli.commands import app, main

__all__ = ["app", "main"]
