"""Every page is in the navigation of the site, and links of pages lead somewhere."""

import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import yaml

import foveate

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
CODE = re.compile(r"^(`{3,}).*?^\1$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, in which tags of Python name functions."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def listed(entries: list) -> Iterator[str]:
    """The pages of a navigation, in order."""
    for entry in entries:
        (at,) = entry.values()
        yield from listed(at) if isinstance(at, list) else [at]


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts and the site make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(page: str) -> set[str]:
    plain = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", plain, re.MULTILINE)}


def test_every_page_is_in_the_navigation_once():
    assert sorted(listed(CONFIG["nav"])) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    for target in LINK.findall(CODE.sub("", text_of(page))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (DOCS / page).parent / path if path else DOCS / page
        assert file.resolve().is_file(), target
        if anchor:
            assert anchor in anchors(file.resolve().relative_to(DOCS).as_posix()), target


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("`tome`", "tome"),
        ("keep = 0.25", "keep--025"),
        ("What is refused, and why", "what-is-refused-and-why"),
        ("A [link](there.md) in it", "a-link-in-it"),
        ("Questions in CLIP's space", "questions-in-clips-space"),
    ],
)
def test_anchors_are_those_of_code_hosts(heading, anchor):
    assert slug(heading) == anchor


def test_every_public_name_has_a_page():
    named = {name for page in PAGES for name in re.findall(r"^::: (\S+)$", text_of(page), re.M)}
    for name in named:
        pkgutil.resolve_name(name)  # raises where there is no such name
    with_core = {name for name in foveate.__all__ if hasattr(foveate.core, name)}
    others = set(foveate.__all__) - with_core - {"methods", "FoveateError"}  # of methods.md, errors
    assert {f"foveate.{name}" for name in others} <= named
    assert {"foveate.core", "foveate.errors", "foveate.testing"} <= named


@pytest.fixture
def site_links(monkeypatch):
    """The extension that treats links out of docs/, without Markdown."""
    for name in ("markdown", "markdown.extensions", "markdown.treeprocessors"):
        bare = SimpleNamespace(Markdown=object, Extension=object, Treeprocessor=Bare)
        monkeypatch.setitem(sys.modules, name, bare)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sys.modules.pop("site_links", None)
    import site_links

    yield site_links
    sys.modules.pop("site_links", None)


class Bare:
    """Markdown's base class of tree processors."""

    def __init__(self, md):
        pass


@pytest.mark.parametrize(
    ("target", "repository", "made"),
    [
        ("../foveate/run.py", "", "<p><span>x</span></p>"),
        ("../foveate/run.py", "https://h/r/", '<p><a href="https://h/r/blob/HEAD/foveate/run.py">'),
        ("../foveate/no.py", "", '<p><a href="../foveate/no.py">'),
        ("../choose.md", "", '<p><a href="../choose.md">'),
        ("https://h/../README.md", "", '<p><a href="https://h/../README.md">'),
    ],
)
def test_links_out_of_the_pages_become_text_or_lead_to_the_repository(
    site_links, target, repository, made
):
    root = ElementTree.fromstring(f'<p><a href="{target}">x</a></p>')
    site_links.OutsideLinks(None, repository).run(root)
    assert ElementTree.tostring(root, encoding="unicode").startswith(made)
