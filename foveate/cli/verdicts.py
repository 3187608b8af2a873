"""`foveate list --model`: what works on a model, and why not."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from foveate.cli.console import progress
from foveate.cli.listing import method_table
from foveate.core import Method, get_method
from foveate.core.from_text import signature
from foveate.errors import FoveateError, UnsupportedModelError
from foveate.families import find_family
from foveate.loading import load_skeleton
from foveate.run import Session


def show_model(name: str, console: Console) -> None:
    """Print what works on a model; weights are not looked at.

    Args:
        name: hub id, local folder or `tiny`.
        console: where to.

    Raises:
        FoveateError: there is no such model, or it is not supported.
    """
    with progress() as steps:
        steps.say(f"reading the config of {name}")
        model = load_skeleton(name)
        description = describe_model(model)
    console.print(f"[bold]{escape(name)}[/] is {escape(description)}")
    heading = "works on this model"
    console.print(method_table(heading, lambda entry: verdict(model, get_method(entry.slug))))


def verdict(model: Any, cls: type[Method]) -> str:
    """Whether a method with its default settings works on a model, as Rich markup."""
    try:
        Session(model, cls())
    except FoveateError as error:
        return f"[red]no[/]: {escape(str(error))}"
    except TypeError:
        return f"[yellow]needs settings[/]: {escape(signature(cls))}"
    return "[green]yes[/]"


def describe_model(model: Any) -> str:
    """One line about the sizes of a model."""
    family = find_family(model)
    try:
        encoder = f"{family.vision_layers} encoder layers"
    except UnsupportedModelError:
        encoder = "an encoder that foveate cannot look into"
    return f"{family.model_type}: {encoder}, {family.text_layers} decoder layers"
