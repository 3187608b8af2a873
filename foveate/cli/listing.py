"""`foveate list`: what there is, and what works on a model."""

from __future__ import annotations

import string
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from foveate.core import STAGES, Method, get_method, list_methods
from foveate.core.from_text import signature
from foveate.errors import FoveateError, UnsupportedModelError
from foveate.families import find_family
from foveate.families.support import Matrix, support
from foveate.run import Session


def methods_in_stream_order() -> list[type[Method]]:
    """All registered methods, by stage and then by name."""
    classes = [get_method(name) for name in list_methods()]
    return sorted(classes, key=lambda cls: (STAGES.index(cls.stage), cls.slug))


def method_table(model: Any = None) -> Table:
    """Methods with stage, needs and paper; with a model, whether they work on it and why not.

    Args:
        model: a supported model; weights are not looked at, so it may live on the meta device.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
    headings = ["method", "stage", "needs", "paper" if model is None else "works on this model"]
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading == "method")
    for cls in methods_in_stream_order():
        last = escape(cls.paper or "baseline") if model is None else verdict(model, cls)
        needs = "\n".join(cls.needs) or "-"
        table.add_row(f"[bold]{cls.slug}[/]", cls.stage, needs, last)
    return table


def verdict(model: Any, cls: type[Method]) -> str:
    """Whether a method with its default settings works on a model, as Rich markup."""
    try:
        Session(model, cls())
    except FoveateError as error:
        return f"[red]no[/]: {escape(str(error))}"
    except TypeError:
        return f"[yellow]needs settings[/]: {escape(signature(cls))}"
    return "[green]yes[/]"


def family_table(tick: str = "yes") -> tuple[Table, dict[str, tuple[str, ...]], list[str]]:
    """Which method works on which family; what the letters above columns stand for, methods that
    work alike; and the notes that the numbers stand for.

    Args:
        tick: what stands for a method that works.
    """
    order = [cls.slug for cls in methods_in_stream_order()]
    matrix = Matrix.of(support(), order, together=True)
    style: Any = {"box": box.SIMPLE_HEAD, "padding": (0, 0, 0, 1)}
    table = Table(**style, pad_edge=False, header_style="bold cyan")
    table.add_column("family", no_wrap=True)
    letters = dict(zip(string.ascii_uppercase, matrix.columns, strict=False))
    for letter in letters:
        table.add_column(letter, no_wrap=True)
    for model_type, marks in matrix.rows.items():
        cells = [
            " ".join([f"[green]{tick}[/]"] * works + [f"[yellow]{note}[/]"] * bool(note))
            for works, note in marks
        ]
        table.add_row(f"[bold]{model_type}[/]", *cells)
    return table, letters, matrix.notes


def describe_model(model: Any) -> str:
    """One line about the sizes of a model."""
    family = find_family(model)
    try:
        encoder = f"{family.vision_layers} encoder layers"
    except UnsupportedModelError:
        encoder = "an encoder that foveate cannot look into"
    return f"{family.model_type}: {encoder}, {family.text_layers} decoder layers"
