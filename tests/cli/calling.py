"""Calling the command line in this process."""

from typer.testing import CliRunner

from foveate.cli import app


def call(*arguments: str, columns: int = 120):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns), "TERM": "dumb"})
