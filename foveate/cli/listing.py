"""`foveate list`: what there is. It reads files, and imports neither methods nor models."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foveate.core.catalog import Entry, catalog
from foveate.families.support import YES, Matrix, reasons, support
from foveate.families.unsupported import unsupported_families

_BRIEF = re.compile(r".{25,}?(?=[,:] |$)")
"""The first clause of a reason."""
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


def plain_table(*headings: str) -> Table:
    """A table without lines, whose last column takes what the others leave."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
    for heading in headings:
        table.add_column(heading, no_wrap=heading != headings[-1], overflow="fold")
    return table


def show_methods(console: Console, *, verbose: bool = False) -> None:
    """Print all methods: stage, what they do, the paper; with `verbose` what they read too."""
    if verbose:
        table = plain_table("method", "stage", "what it does, what it reads, paper")
        for entry in catalog():
            reads = f"\n[dim]reads {', '.join(entry.needs)}[/]" if entry.needs else ""
            paper = ", ".join(filter(None, (entry.title, entry.paper))) or "baseline"
            about = f"{escape(entry.does)}{reads}\n[dim]{escape(paper)}[/]"
            table.add_row(f"[bold]{escape(entry.slug)}[/]", entry.stage, about)
    else:
        table = plain_table("method", "stage", "what it does", "arXiv")
        table.columns[-1].no_wrap = True
        for entry in catalog():
            name = f"[bold]{escape(entry.slug)}[/]"
            table.add_row(name, entry.stage, escape(entry.does), _paper(entry))
    console.print(table)


def methods_data() -> list[dict[str, Any]]:
    """All methods as JSON values."""
    return [
        {
            "method": entry.slug,
            "stage": entry.stage,
            "does": entry.does,
            "needs": list(entry.needs),
            "paper": entry.paper,
            "title": entry.title,
        }
        for entry in catalog()
    ]


def _paper(entry: Entry) -> str:
    found = ARXIV.search(entry.paper)
    return found[1] if found else escape(entry.paper or "baseline")


def show_families(console: Console, *, verbose: bool = False) -> None:
    """Print the families that are supported, and for each reason what is refused.

    Args:
        console: where to.
        verbose: show the whole matrix, with every method on every family.
    """
    if verbose:
        _show_matrix(console)
    else:
        _show_reasons(console)


def _show_reasons(console: Console) -> None:
    families = sorted({family for of in support().values() for family in of})
    console.print(f"[bold]{len(families)} families are supported[/] (`config.model_type`):")
    _indented(console, families)
    found = reasons(support())
    wide = {why: of for why, of in found.items() if len(of[1]) > 1}
    console.print("\n[bold]Methods that some of them cannot run[/]")
    table = plain_table("reason", "methods", "families")
    for column in table.columns:
        column.no_wrap = False
    table.columns[0].ratio, table.columns[1].ratio = 5, 4
    table.columns[2].justify = "right"
    table.expand = True
    for why, (methods, where) in wide.items():
        table.add_row(escape(why), _several(methods), str(len(where)))
    console.print(table)
    console.print(f"[dim]and {len(found) - len(wide)} reasons that apply to one family each[/]")
    console.print("\n[bold]Families that are not supported[/]")
    short = {name: _BRIEF.match(why)[0] for name, why in unsupported_families().items()}  # type: ignore[index]
    table = plain_table("families", "reason")
    table.columns[0].no_wrap = False
    table.columns[0].min_width, table.columns[1].ratio, table.expand = 24, 1, True
    for names, why in _grouped(short).items():
        table.add_row(f"[yellow]{', '.join(names)}[/]", escape(why))
    console.print(table)
    console.print(
        "\n[dim]`foveate list --families --verbose` shows every cell and the full reasons.[/]"
    )


def _several(names: Iterable[str], most: int = 3) -> str:
    """Names, the first few of many."""
    names = list(names)
    if len(names) <= most + 1:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def _grouped(reasons_of: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    """Names of equal value together, in the order of the first."""
    found: dict[str, list[str]] = {}
    for name, why in reasons_of.items():
        found.setdefault(why, []).append(name)
    return {tuple(names): why for why, names in found.items()}


def _indented(console: Console, words: Iterable[str]) -> None:
    """A list of words, folded to the width of the console and indented."""
    console.print(Padding(Text(", ".join(words)), (0, 0, 0, 2)))


def families_data() -> dict[str, Any]:
    """What works on which family, and which families are refused, as JSON values."""
    return {"supported": support(), "unsupported": unsupported_families()}


def _show_matrix(console: Console) -> None:
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


def family_table(tick: str = YES) -> tuple[Table, dict[str, tuple[str, ...]], list[str]]:
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
