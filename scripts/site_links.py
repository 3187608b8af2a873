"""For `make site`: links of docs/ to files beside it, which are no pages of the site.

A link to `../foveate/run.py` works where the repository is read. On the site it leads to that file
at `repository`, which mkdocs.yml may give; without it, the text is left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor

ROOT = Path(__file__).parents[1]


class OutsideLinks(Treeprocessor):
    """Leads links out of docs/ to the repository."""

    def __init__(self, md: Markdown, repository: str) -> None:
        super().__init__(md)
        self.repository = repository.rstrip("/")

    def run(self, root: Element) -> None:
        """Change a page; a name that the repository lacks is left to the check of links."""
        for link in root.iter("a"):
            up, _, path = link.get("href", "").partition("../")
            if up or not path or not (ROOT / path).is_file():
                continue
            if self.repository:
                link.set("href", f"{self.repository}/blob/HEAD/{path}")
            else:
                link.tag = "span"
                del link.attrib["href"]


class SiteLinks(Extension):
    """Leads links out of docs/ to the repository."""

    def __init__(self, **given: Any) -> None:
        self.config = {"repository": ["", "where the repository is read, without a slash"]}
        super().__init__(**given)

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """After links were made, before the site rewrites them."""
        made = OutsideLinks(md, self.getConfig("repository"))
        md.treeprocessors.register(made, "site_links", 15)


def makeExtension(**given: Any) -> SiteLinks:  # noqa: N802
    """What Markdown asks for."""
    return SiteLinks(**given)
