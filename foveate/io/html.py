"""Reports as one HTML file: what all of them are made of.

No other file and no network is needed to read one. Texts are escaped by whoever puts them in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        anchor: what links point to.
        link: its name in the navigation.
        title: its heading.
        body: HTML.
    """

    anchor: str
    link: str
    title: str
    body: str


def document(title: str, headline: str, sections: Sequence[Section], script: str = "") -> str:
    """A whole page, which follows the reader's choice of light or dark.

    Args:
        title: of the page, as text.
        headline: what it says in a sentence, as text.
        sections: its parts, with links to them at the top.
        script: JavaScript that runs once the page is there.
    """
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{part.anchor}">{part.link}</a>' for part in sections)
    parts = "\n".join(
        f'<section id="{part.anchor}"><h2>{part.title}</h2>{part.body}</section>'
        for part in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>\n'
        f"<style>\n{style}</style></head><body><main>\n"
        f'<header><h1>{escape(title)}</h1><p class="faint">{escape(headline)}</p>\n'
        f"<nav>{links}</nav></header>\n{parts}\n</main>"
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[str], terms: Mapping[str, str]) -> str:
    """A table that scrolls in a narrow window, with its first column in sight.

    Args:
        head: headings, as text; a comma begins a unit.
        rows: HTML of each row.
        terms: what headings mean, which they say when they are pointed at.
    """
    cells = "".join(f'<th scope="col">{_heading(cell, terms)}</th>' for cell in head)
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def glossary(terms: Mapping[str, str]) -> str:
    """What terms mean, as a list."""
    told = (f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in terms.items())
    return f"<dl>{''.join(told)}</dl>"


def _heading(text: str, terms: Mapping[str, str]) -> str:
    said = terms.get(text.partition(",")[0])
    if said is None:
        return escape(text)
    return f'<abbr tabindex="0" title="{escape(said)}">{escape(text)}</abbr>'
