"""BibTeX entries, from what methods say of their papers; nothing is imported for it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from foveate import __version__
from foveate.core.catalog import Entry, catalog
from foveate.core.registry import unknown_method
from foveate.errors import InputError
from foveate.io.quoting import quoted

OWN = f"""@software{{foveate,
  title = {{foveate: faster vision-language models by removing visual tokens}},
  author = {{{{The foveate authors}}}},
  version = {{{__version__}}},
  license = {{Apache-2.0}}
}}"""
PAPER = re.compile(r"(?P<who>.+?)(?P<more> et al\.)?,? (?:\w+ )?(?P<year>\d{4}),")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def entries(names: Sequence[str]) -> list[str]:
    """BibTeX entries of some methods, each paper once; without a name, that of foveate.

    Raises:
        UnknownMethodError: there is no such method; the message lists near matches.
        InputError: a method has no paper.
    """
    known = {entry.slug: entry for entry in catalog()}
    found: dict[str, str] = {}
    for name in (part.strip() for given in names for part in given.split("+")):
        if name not in known:
            raise unknown_method(name, known)
        entry = known[name]
        found.setdefault(entry.paper, bibtex(entry))
    return list(found.values()) or [OWN]


def bibtex(entry: Entry) -> str:
    """The entry of one method's paper.

    Raises:
        InputError: it has none, or does not say it as `Doe et al. 2025, arXiv:2501.00001`.
    """
    paper, arxiv = PAPER.match(entry.paper), ARXIV.search(entry.paper)
    if paper is None or arxiv is None:
        raise InputError(
            f"{entry.slug} has no paper to cite"
            + (f", only {quoted(entry.paper)}" if entry.paper else "")
        )
    who = f"{paper['who']} and others" if paper["more"] else f"{{{paper['who']}}}"
    fields = {
        "title": f"{{{_escaped(entry.title or entry.slug)}}}",
        "author": who,
        "year": paper["year"],
        "eprint": arxiv[1],
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{arxiv[1]}",
    }
    if paper["who"] == entry.title:  # its authors are not known here
        del fields["author"]
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{entry.slug},\n{lines}\n}}"


def _escaped(text: str) -> str:
    """Text that LaTeX takes for what it is."""
    return re.sub(r"([&%$#_])", r"\\\1", text)
