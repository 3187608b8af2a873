"""`foveate list`: what there is. It reads files, and imports neither methods nor models."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.core.catalog import Entry, catalog
from foveate.families.support import Matrix, support
from foveate.families.unsupported import unsupported_families


def method_table(heading: str = "paper", last: Callable[[Entry], str] | None = None) -> Table:
    """Methods with stage, needs and one thing more, by default the paper.

    Args:
        heading: of the last column.
        last: what stands in it, as Rich markup; `None` for the paper.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
    for title in ("method", "stage", "needs", heading):
        table.add_column(title, overflow="fold", no_wrap=title == "method")
    for entry in catalog():
        needs = "\n".join(entry.needs) or "-"
        table.add_row(f"[bold]{entry.slug}[/]", entry.stage, needs, (last or _paper)(entry))
    return table


def _paper(entry: Entry) -> str:
    return escape(entry.paper or "baseline")


def show_families(console: Console) -> None:
    """Print which method works on which family, why not, and which families are refused."""
    tick = "✓" if console.encoding.startswith("utf") else "yes"
    table, letters, notes = family_table(tick)
    for letter, names in letters.items():
        console.print(f"[bold cyan]{letter}[/] {', '.join(names)}", soft_wrap=True)
    wide = console.options.update(max_width=1000)
    needed = console.measure(table, options=wide).maximum  # no column may be left out
    width, console.width = console.width, max(needed, console.width)
    console.print(table)
    console.width = width
    for number, note in enumerate(notes, 1):
        console.print(f"[yellow]{number}[/] {escape(note)}", soft_wrap=True)
    console.print()
    for family, reason in unsupported_families().items():
        console.print(f"[dim]{family} is not supported: {escape(reason)}[/]", soft_wrap=True)


def family_table(tick: str = "yes") -> tuple[Table, dict[str, tuple[str, ...]], list[str]]:
    """Which method works on which family; what the letters above columns stand for, methods that
    work alike; and the notes that the numbers stand for.

    Args:
        tick: what stands for a method that works.
    """
    order = [entry.slug for entry in catalog()]
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
